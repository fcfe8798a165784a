// Bands to pictures: labels in the model's colours or in ones that the colour-blind tell apart, maps in the one ramp of the server.

import { NO_LABEL, shareOf, valueIn } from "./answer.js";
import { STOPS } from "./ramp.js";

const STRIPE_PX = 4, STRIPES = 128, BLACK = 0xff000000, WHITE = 0xffffffff, DIMMED = 0x30;

/** Told apart by CIEDE2000 of 8.8 and more, of the first twelve 12.0, also without the red or the green cones. */
const SAFE = [
  [0, 90, 166], [166, 255, 51], [51, 90, 0], [255, 204, 255], [90, 166, 128], [166, 128, 255], [90, 90, 90], [128, 255, 204],
  [166, 128, 0], [166, 128, 166], [51, 51, 90], [90, 204, 90], [51, 128, 90], [90, 51, 51], [51, 128, 128], [51, 204, 204],
  [0, 90, 255], [204, 0, 51], [0, 0, 204], [204, 166, 255], [128, 204, 166], [166, 166, 166], [0, 166, 90], [204, 51, 128],
];

export const isSafePossible = (classes) => classes.length <= SAFE.length;

/** The classes' colours, [[r, g, b], ...]. */
export const colorsOf = (classes, isSafe) => classes.map(({ color }, k) => (isSafe ? SAFE[k] : color));

const word = ([r, g, b], alpha = 255) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;

const RAMP = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (STOPS.length - 1), below = Math.min(Math.floor(place), STOPS.length - 2);
  const [from, to] = [STOPS[below], STOPS[below + 1]].map((hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
  return from.map((tone, channel) => Math.round(tone + (to[channel] - tone) * (place - below)));
});
const OPAQUE = Uint32Array.from(RAMP, (color) => word(color));
const FADING = Uint32Array.from(RAMP, (color, i) => word(color, i));

/** Paints a band's labels. only: the one class that is not dimmed, or undefined. hide: {map, above} or nothing.
    Striped, as no class can look, is what has no label or is hidden. Returns how many pixels hide hid. */
export function paintLabels(band, { colors, only, hide, size }) {
  const table = Uint32Array.from({ length: 256 }, (_, k) => (k in colors ? word(colors[k], only === undefined || only === k ? 255 : DIMMED) : 0));
  const stripe = Math.max(STRIPE_PX, Math.floor(Math.max(...size) / STRIPES)), { labels, width, y0 } = band;
  let hidden = 0;
  band.labelsShown = drawn(band, (i) => {
    const isHidden = hide && labels[i] !== NO_LABEL && valueIn(band, hide.map, i) > hide.above;
    if (isHidden) hidden += 1;
    if (!isHidden && labels[i] in colors) return table[labels[i]];
    return Math.floor(((i % width) + Math.floor(i / width) + y0) / stripe) % 2 ? WHITE : BLACK;
  }, band.labelsShown);
  return hidden;
}

/** Paints a band's map on a scale; where `isFading`, the surer the more of what is below is seen. */
export function paintMap(band, { name, scale, isFading }) {
  const ramp = isFading ? FADING : OPAQUE;
  band.mapShown = drawn(band, (i) => ramp[Math.round(255 * shareOf(valueIn(band, name, i), scale)) || 0], band.mapShown);
}

/** Paints shares [0, 1] of a picture by themselves. */
export function paintShares(shares, width) {
  return drawn({ width, height: shares.length / width }, (i) => OPAQUE[Math.round(255 * shares[i])]);
}

function drawn({ width, height }, colorAt, canvas = document.createElement("canvas")) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pixels = new Uint32Array(width * height);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colorAt(i);
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), width, height), 0, 0);
  return canvas;
}
