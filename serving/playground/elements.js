// What every part of the page does with its elements, and with places on a picture.

export const $ = (id) => document.getElementById(id);

/** A new element with these properties and this content. */
export function make(tag, properties, ...content) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...content);
  return element;
}

/** Where a pointer is over a canvas, in pixels of the picture that it shows: [x, y]. */
export function pixelUnder(canvas, { clientX, clientY }, { width, height }) {
  const frame = canvas.getBoundingClientRect();
  return [((clientX - frame.left) / frame.width) * width, ((clientY - frame.top) / frame.height) * height];
}

export function clamp(value, least, most) {
  return Math.max(least, Math.min(most, value));
}
