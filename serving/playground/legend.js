// The classes beside their labels: share and mean entropy of each, one of them alone, and what has no label.

import { NO_LABEL, tally } from "./answer.js";
import { $, make } from "./elements.js";

/** changed(): another class is to stand out. */
export function makeLegend(changed) {
  let chosen, hovered;

  function rowOf(answer, name, label, { count, entropy }, swatch) {
    const total = answer.bands.reduce((sum, { labels }) => sum + labels.length, 0), share = `${((100 * count) / total).toFixed(1)} %`;
    const mean = count && label !== NO_LABEL && !Number.isNaN(entropy) ? (entropy / count).toFixed(3) : "";
    const button = make("button", { type: "button", title: "Show it alone" }, swatch, name);
    button.setAttribute("aria-pressed", chosen === label);
    const row = make("tr", { className: count ? "" : "absent" }, ...[button, share, mean].map((cell) => make("td", {}, cell)));
    if (label === NO_LABEL) button.disabled = true;
    button.addEventListener("click", () => choose(label));
    for (const [event, value] of [["mouseenter", label], ["mouseleave", undefined]]) row.addEventListener(event, () => hover(value));
    return row;
  }

  function choose(label) {
    chosen = chosen === label ? undefined : label;
    for (const [k, button] of $("legend").querySelectorAll("button").entries()) button.setAttribute("aria-pressed", k === chosen);
    changed();
  }

  function hover(label) {
    hovered = label === NO_LABEL ? undefined : label;
    changed();
  }

  return {
    only: () => hovered ?? chosen,
    clear() {
      [chosen, hovered] = [];
      $("legend").replaceChildren();
    },
    show(answer, classes, colors) {
      const counts = tally(answer);
      const rows = classes.map(({ name }, k) => rowOf(answer, name, k, counts[k], swatchOf(colors[k])));
      const without = counts[NO_LABEL];
      if (without.count) rows.push(rowOf(answer, "no label", NO_LABEL, without, swatchOf()));
      $("legend").replaceChildren(...rows);
    },
  };
}

/** A patch of a class's colour; striped without one. */
export function swatchOf(color) {
  const swatch = make("span", { className: color ? "swatch" : "swatch striped" });
  if (color) swatch.style.background = `rgb(${color})`;
  return swatch;
}
