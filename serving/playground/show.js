// What an answer looks like around the picture: its scores, the scale of the map, the pixel that was picked, times.

import { at, probabilitiesAt, ticksOf, titleOf, useOf, valueIn } from "./answer.js";
import { $, make } from "./elements.js";
import { swatchOf } from "./legend.js";
import { STOPS } from "./ramp.js";

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const isStrange = (sentence) => sentence.startsWith("this picture is stranger than");
const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;
const quiet = (...content) => make("p", { className: "quiet" }, ...content);

function row(...cells) {
  return make("tr", {}, ...cells.map((content) => make("td", {}, content)));
}

/** Scores and warnings above the picture. */
export function showBanner({ expected_error: error, novelty, warnings }) {
  const scores = [[error, "of the pixels are expected to be wrong"], [novelty, "of the reference pictures are less strange"]];
  const told = scores.filter(([share]) => share !== undefined && share !== null).map(([share, what]) => `${percent(share)} ${what}`);
  const strange = warnings.find(isStrange);
  $("scores").textContent = told.length ? `${told.join("; ")}.` : "";
  $("warnings").textContent = warnings.filter((text) => !isStrange(text)).map(sentence).join(" ");
  $("strange").textContent = strange ? sentence(strange) : "";
  $("strange").hidden = !strange;
  $("banner").classList.toggle("strange", Boolean(strange));
  $("banner").hidden = !told.length && !warnings.length;
}

/** One sentence of how an answer was made. */
export function outcome({ samples, seed, members, abstained }) {
  const made = members.length ? `Done with ${members.join(", ")}.` : `Done with ${samples} sample${samples > 1 ? "s" : ""}, seed ${seed}.`;
  return abstained === undefined || abstained === null ? made : `${made} ${percent(abstained)} withheld.`;
}

/** What says sentences in one line of the page. live: whether a screen reader says it. */
export const sayIn = (id) => (text, isWrong = false, live = "polite") => {
  Object.assign($(id), { ariaLive: live, textContent: text });
  $(id).classList.toggle("wrong", isWrong);
};

export function showScale(name, scale, card) {
  $("bar").hidden = false;
  $("bar-title").textContent = titleOf(name) + (scale.isFixed ? "" : " (this picture's own scale)");
  $("bar-use").textContent = useOf(name, card);
  $("ramp").style.background = `linear-gradient(90deg, ${STOPS.join(", ")})`;
  $("ticks").replaceChildren(...ticksOf(scale).map(([share, text]) => {
    const tick = make("span", {}, text);
    tick.style.left = `${100 * share}%`;
    return tick;
  }));
}

export function showTimes(phases, ms) {
  const rows = [...phases.map(([name, spent]) => [`server: ${name.replaceAll("_", " ")}`, spent]), ["as seen here", ms]];
  $("timing").replaceChildren(...rows.map(([name, spent]) => row(name, `${spent.toFixed(1)} ms`)));
}

const named = (label, classes, colors) => make("span", {}, swatchOf(colors[label]), classes[label]?.name ?? "no label");

/** Everything about one pixel. */
export function showPixel(answer, pixel, { classes, colors }) {
  const found = answer && pixel && at(answer, pixel.x, pixel.y);
  if (!found) return $("pixel").replaceChildren(quiet("Click the picture, or move over it with the arrow keys."));
  const { band, place } = found, rows = Object.keys(band.maps).map((name) => row(titleOf(name), valueIn(band, name, place).toFixed(4)));
  const shares = probabilitiesAt(found, classes.length), bar = (share) => make("span", {}, make("meter", { value: share || 0 }), ` ${share.toFixed(4)}`);
  if (shares) for (const k of [...shares.keys()].sort((a, b) => shares[b] - shares[a])) rows.push(row(named(k, classes, colors), bar(shares[k])));
  else rows.push(row("probabilities", "not for pictures of this size"));
  $("pixel").replaceChildren(quiet(`x ${pixel.x}, y ${pixel.y}: `, named(band.labels[place], classes, colors)), make("table", {}, ...rows));
}

/** One line about the pixel under the pointer, or none. */
export function showHover(answer, pixel, map, classes) {
  const found = answer && pixel && at(answer, pixel.x, pixel.y);
  $("hover").value = !found ? "" : `${pixel.x}, ${pixel.y}: ${classes[found.band.labels[found.place]]?.name ?? "no label"}, ${titleOf(map)} ${valueIn(found.band, map, found.place).toFixed(3)}`;
}
