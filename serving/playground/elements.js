// What every part of the page does with its elements.

export const $ = (id) => document.getElementById(id);

/** A new element with these properties and this content. */
export function make(tag, properties, ...content) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...content);
  return element;
}

export function clamp(value, least, most) {
  return Math.max(least, Math.min(most, value));
}
