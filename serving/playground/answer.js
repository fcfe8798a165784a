// An answer as it is held here: bands of rows from the top, each with its labels and maps, one way for all sizes.

import { clamp } from "./elements.js";

export const NO_LABEL = 255;

/** What is known of the maps of every model: its unit, and what one uses it for. */
const KNOWN = {
  entropy: "How unsure the answer is in all: use it to find mistakes.",
  confidence: "1 minus the probability of the label: use it to find mistakes; its mean is the expected error.",
  mutual_information: "Where the samples contradict each other: use it to find things that the model has not learned.",
  expected_entropy: "What every sample is unsure of alike: edges, small things, real ambiguity; more samples do not help.",
  margin: "1 minus the lead over the runner-up: use it to find what is nearly called something else.",
  seam: "Where overlapping windows contradict each other: how the picture was cut, not what the model knows.",
};
const NATS = ["entropy", "mutual_information", "expected_entropy", "seam"];

/** Whether bright in the map as the server has it means trust: it is shown as 1 minus itself then. */
const isTrust = (name) => name === "confidence" || name.endsWith("margin");

export const titleOf = (name) => (isTrust(name) ? "1 − " : "") + name.replaceAll("_", " ");

export const useOf = (name, card) => KNOWN[name] ?? card.extra_maps.find((extra) => extra.name === name)?.description ?? "";

/** One band of the whole height, from exact tensors. */
export function wholeBand({ labels, probabilities, ...maps }) {
  const [height, width] = labels.shape;
  const own = Object.entries(maps).map(([name, { values }]) => [name, { values, step: 1, base: 0 }]);
  return { y0: 0, height, width, labels: labels.values, maps: Object.fromEntries(own), probabilities: probabilities?.values };
}

/** A map's value as it is shown, bright for distrust. NaN where nothing was measured. */
export function valueIn(band, name, place) {
  const { values, step, base } = band.maps[name], value = values[place] * step + base;
  return isTrust(name) ? 1 - value : value;
}

/** {band, place} of a pixel, or nothing where no band has it yet. */
export function at(answer, x, y) {
  const band = answer.bands.find(({ y0, height }) => y >= y0 && y < y0 + height);
  return band && { band, place: (y - band.y0) * band.width + x };
}

/** {low, high, unit, isFixed}: the same for all pictures where the map has ends, else, or if asked for, of this picture. */
export function scaleOf(answer, name, card, isStretched) {
  const unit = NATS.includes(name) ? "nats" : card.extra_maps.find((extra) => extra.name === name)?.unit ?? "";
  if (!isStretched && isTrust(name)) return { low: 0, high: 1, unit, isFixed: true };
  if (!isStretched && NATS.includes(name)) return { low: 0, high: Math.log(Math.max(2, card.classes.length)), unit, isFixed: true };
  let [low, high] = [Infinity, -Infinity];
  for (const band of answer.bands) for (let i = 0; i < band.labels.length; i++) {
    const value = valueIn(band, name, i);
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return { low: Math.min(low, high), high: high > low ? high : low + 1e-6, unit, isFixed: false };
}

/** [{count, entropy}] by label, entropy the sum over its pixels. */
export function tally(answer) {
  const classes = Array.from({ length: 256 }, () => ({ count: 0, entropy: 0 }));
  for (const band of answer.bands) for (let i = 0; i < band.labels.length; i++) {
    const one = classes[band.labels[i]];
    one.count += 1;
    if (band.maps.entropy) one.entropy += valueIn(band, "entropy", i);
  }
  return classes;
}

/** Every class's probability at a pixel, or nothing: answers of large pictures come without. */
export function probabilitiesAt({ band, place }, numClasses) {
  if (!band.probabilities) return undefined;
  return Array.from({ length: numClasses }, (_, k) => band.probabilities[k * band.labels.length + place]);
}

/** Ticks of a scale, with their unit on the last one. */
export function ticksOf({ low, high, unit }) {
  const text = (value) => (value === 0 ? "0" : value.toPrecision(2));
  return [0, 0.25, 0.5, 0.75, 1].map((share) => [share, text(low + share * (high - low)) + (share === 1 && unit ? ` ${unit}` : "")]);
}

export const shareOf = (value, { low, high }) => clamp((value - low) / (high - low), 0, 1);
