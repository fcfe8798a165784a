// Arrays to pictures: labels in the model's colours, maps on a scale that is dark where the network is sure.

const STOPS = [[8, 10, 40], [80, 20, 110], [180, 50, 100], [245, 130, 60], [252, 240, 180]];
const STRIPE_PX = 4, STRIPES = 128, BLACK = [0, 0, 0], WHITE = [255, 255, 255];

/** Draws labels; what has none (withheld, no measurement) is striped, which no class can look like. */
export function paintLabels(canvas, [height, width], labels, classes) {
  const stripe = Math.max(STRIPE_PX, Math.floor(Math.max(height, width) / STRIPES));
  const striped = (i) => (Math.floor(((i % width) + Math.floor(i / width)) / stripe) % 2 ? WHITE : BLACK);
  paint(canvas, height, width, (i) => classes[labels[i]]?.color ?? striped(i));
}

/** Draws a map, whose `top` and beyond are brightest. */
export function paintMap(canvas, [height, width], values, top) {
  const ramp = Array.from({ length: 256 }, (_, i) => shade(i / 255));
  paint(canvas, height, width, (i) => ramp[Math.max(0, Math.min(255, Math.round((255 * values[i]) / top) || 0))]);
}

/** The scale as a CSS gradient. */
export function scale() {
  return `linear-gradient(90deg, ${STOPS.map((color) => `rgb(${color})`).join(", ")})`;
}

/** [r, g, b] at a share of the scale. */
function shade(share) {
  const at = share * (STOPS.length - 1), below = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[below].map((from, i) => from + (STOPS[below + 1][i] - from) * (at - below));
}

function paint(canvas, height, width, color) {
  Object.assign(canvas, { width, height });
  const picture = new ImageData(width, height);
  for (let i = 0, place = 0; i < width * height; i++, place += 4) {
    [picture.data[place], picture.data[place + 1], picture.data[place + 2]] = color(i);
    picture.data[place + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}
