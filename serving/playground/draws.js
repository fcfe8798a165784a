// The sample strip: answers of one sample each, side by side, and where they disagree.

import { wholeBand } from "./answer.js";
import { $, make } from "./elements.js";
import { paintLabels, paintShares } from "./paint.js";
import { infer } from "./protocol.js";

const NUM_DRAWS = 4;

let latest;

/** Clears the strip, and asks for no more of it. */
export function endDraws() {
  latest?.abort();
  $("strip").replaceChildren();
}

/** Asks for single samples of the seeds from this one on, without a bound on risk, and shows them. Rejects with an
    AbortError where it is ended. */
export async function showDraws(picture, request, colors) {
  const { seed: first, views, scale } = request.options;
  const seeds = Array.from({ length: NUM_DRAWS }, (_, i) => first + i), bands = [];
  endDraws();
  const { signal } = (latest = new AbortController());
  for (const seed of seeds) {
    const { tensors } = await infer(picture, { ...request, options: { views, samples: 1, seed, ...(scale && { scale }) } }, ["labels", "entropy"], signal);
    signal.throwIfAborted();
    const band = wholeBand(tensors);
    paintLabels(band, { colors, size: [band.width, band.height] });
    bands.push(band);
    $("strip").append(make("figure", {}, band.labelsShown, make("figcaption", {}, `one sample, seed ${seed}`)));
  }
  const shares = disagreement(bands.map(({ labels }) => labels));
  const part = shares.reduce((sum, share) => sum + (share > 0), 0) / shares.length;
  const caption = `where they disagree: ${(100 * part).toFixed(1)} % of the pixels (white: half of them)`;
  $("strip").append(make("figure", {}, paintShares(shares, bands[0].width), make("figcaption", {}, caption)));
}

/** Twice the share of draws that are not the most frequent label's, at most 1, for each pixel. */
function disagreement(draws) {
  return Float32Array.from(draws[0], (_, i) => {
    const votes = new Map();
    for (const labels of draws) votes.set(labels[i], (votes.get(labels[i]) ?? 0) + 1);
    return Math.min(1, 2 * (1 - Math.max(...votes.values()) / draws.length));
  });
}
