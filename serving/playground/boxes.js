// Boxes: drawn, moved and resized on the picture, or typed. Corners in pixels of the picture.

import { $, clamp, make } from "./elements.js";

const NEAR_PX = 8;

/** size(): [width, height] of the picture or nothing. changed(): the boxes are others. */
export function boxEditor({ size, changed }) {
  let rows = [], classes = [], drag, tolerance = NEAR_PX;

  function change(next) {
    rows = next;
    list();
    changed();
  }

  /** Makes the list say the rows. Its lines stay where they are, so that what has the focus keeps it. */
  function list() {
    const lines = $("boxes").children;
    while (lines.length > rows.length) {
      const last = $("boxes").lastElementChild, hadFocus = last.contains(document.activeElement);
      last.remove();
      if (hadFocus) ($("boxes").lastElementChild?.querySelector("button") ?? $("boxes-clear")).focus();
    }
    while (lines.length < rows.length) $("boxes").append(listed(lines.length));
    rows.forEach((row, i) => {
      lines[i].querySelector("input").value = row.slice(0, 4).join(", ");
      lines[i].querySelector("select").selectedIndex = row[4];
    });
  }

  function listed(i) {
    const remove = make("button", { type: "button", ariaLabel: `Remove box ${i + 1}`, title: "Remove" }, "×");
    const corners = make("input", { ariaLabel: `Corners of box ${i + 1}` });
    const kind = make("select", { ariaLabel: `Class of box ${i + 1}` }, ...classes.map(({ name }) => new Option(name)));
    remove.addEventListener("click", () => change(rows.filter((_, at) => at !== i)));
    const edit = () => replace(i, [...(cornersIn(corners.value) ?? rows[i].slice(0, 4)), kind.selectedIndex]);
    for (const input of [corners, kind]) input.addEventListener("change", edit);
    return make("li", {}, kind, remove, corners);
  }

  /** Four numbers, or nothing. */
  function cornersIn(text) {
    const numbers = text.split(",").map((part) => (part.trim() ? Number(part) : NaN));
    return numbers.length === 4 && numbers.every(Number.isFinite) ? numbers : undefined;
  }

  /** A box whose corners are in order and inside the picture, or nothing. */
  function tidy([x0, y0, x1, y1, label]) {
    const [width, height] = size();
    const [left, right] = [x0, x1].map((x) => clamp(Math.round(x), 0, width)).sort((a, b) => a - b);
    const [top, bottom] = [y0, y1].map((y) => clamp(Math.round(y), 0, height)).sort((a, b) => a - b);
    return right > left && bottom > top ? [left, top, right, bottom, label] : undefined;
  }

  /** Puts a box in the i-th place; one that is none leaves all as they were. */
  function replace(i, row) {
    const tidied = tidy(row);
    change(tidied ? [...rows.slice(0, i), tidied, ...rows.slice(i + 1)] : rows);
  }

  /** What is taken hold of at a place: {i, part: which of x0, y0, x1, y1 go with the pointer}. */
  function held([x, y]) {
    for (let i = rows.length - 1; i >= 0; i--) {
      const [x0, y0, x1, y1] = rows[i], isAt = (a, b) => Math.abs(a - b) <= tolerance;
      const part = [isAt(x, x0), isAt(y, y0), isAt(x, x1) && !isAt(x, x0), isAt(y, y1) && !isAt(y, y0)];
      const isIn = x > x0 - tolerance && x < x1 + tolerance && y > y0 - tolerance && y < y1 + tolerance;
      if (isIn && part.some(Boolean)) return { i, part };
      if (isIn) return { i, part: [true, true, true, true] };
    }
    return undefined;
  }

  const tool = {
    /** Whether a drag that begins here is of a box. */
    down(at, zoom) {
      if ($("boxes-row").hidden || !$("draw-boxes").checked) return false;
      tolerance = (NEAR_PX * devicePixelRatio) / zoom;
      const taken = held(at), before = taken ? rows[taken.i] : [...at, ...at, $("box-class").selectedIndex];
      drag = { ...(taken ?? { i: rows.length, part: [false, false, true, true] }), from: at, before, row: before };
      return true;
    },
    move([x, y]) {
      const by = [x - drag.from[0], y - drag.from[1]];
      drag.row = drag.before.map((value, place) => (drag.part[place] ? value + by[place % 2] : value));
    },
    up() {
      const { i, row, before } = drag;
      drag = undefined;
      if (row !== before) replace(i, row);
    },
    /** The drag was none. */
    cancel() {
      drag = undefined;
    },
  };

  $("box-add").addEventListener("click", () => {
    if (size()) replace(rows.length, [...["x0", "y0", "x1", "y1"].map((id) => Number($(id).value)), $("box-class").selectedIndex]);
  });
  $("boxes-clear").addEventListener("click", () => change([]));

  return {
    tool,
    /** Another model: its classes, and no boxes. */
    begin(known) {
      classes = known;
      $("box-class").replaceChildren(...classes.map(({ name }) => new Option(name)));
      change([]);
    },
    clear: () => change([]),
    /** [[x0, y0, x1, y1, class], ...] */
    rows: () => rows,
    draw(pen, zoom, colors) {
      const drawn = drag ? [...rows.slice(0, drag.i), drag.row, ...rows.slice(drag.i + 1)] : rows;
      for (const [x0, y0, x1, y1, label] of drawn) {
        for (const [width, tone] of [[5, "#000"], [3, "#fff"], [2, `rgb(${colors[label] ?? "255, 255, 255"})`]]) {
          Object.assign(pen, { lineWidth: (width * devicePixelRatio) / zoom, strokeStyle: tone });
          pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
        }
      }
    },
  };
}
