// Boxes: drawn by mouse on the image, or typed. Corners in pixels of the picture.

import { $, clamp, make, pixelUnder } from "./elements.js";

/** page(): {bitmap, drawAgain}. */
export function boxEditor(page) {
  let rows = [], classes = [], drag;

  function change(next) {
    rows = next;
    $("boxes").replaceChildren(...rows.map((row, i) => {
      const remove = make("button", { type: "button", ariaLabel: `Remove box ${i + 1}` }, "×");
      remove.addEventListener("click", () => change(rows.filter((other) => other !== row)));
      return make("li", {}, `${classes[row[4]].name} ${row.slice(0, 4).join(", ")} `, remove);
    }));
    page().drawAgain();
  }

  function add(x0, y0, x1, y1) {
    const { width, height } = page().bitmap;
    const [left, right] = [x0, x1].map((x) => clamp(Math.round(x), 0, width)).sort((a, b) => a - b);
    const [top, bottom] = [y0, y1].map((y) => clamp(Math.round(y), 0, height)).sort((a, b) => a - b);
    if (right > left && bottom > top) change([...rows, [left, top, right, bottom, $("box-class").selectedIndex]]);
  }

  const place = (event) => pixelUnder($("image"), event, page().bitmap);
  $("image").addEventListener("pointerdown", (event) => {
    if ($("boxes-row").hidden || !page().bitmap) return;
    $("image").setPointerCapture(event.pointerId);
    drag = { from: place(event), to: place(event) };
  });
  $("image").addEventListener("pointermove", (event) => {
    if (!drag) return;
    drag.to = place(event);
    page().drawAgain();
  });
  $("image").addEventListener("pointerup", () => {
    const drawn = drag;
    drag = undefined;
    if (drawn) add(...drawn.from, ...drawn.to);
  });
  $("image").addEventListener("pointercancel", () => (drag = undefined));
  $("box-add").addEventListener("click", () => page().bitmap && add(...["x0", "y0", "x1", "y1"].map((id) => Number($(id).value))));

  return {
    /** Another model: its classes, and no boxes. */
    begin(known) {
      classes = known;
      $("image").classList.toggle("drawing", !$("boxes-row").hidden);
      $("box-class").replaceChildren(...classes.map(({ name }) => new Option(name)));
      change([]);
    },
    clear: () => change([]),
    /** [[x0, y0, x1, y1, class], ...] */
    rows: () => rows,
    draw(pen) {
      const drawn = drag ? [...rows, [...drag.from, ...drag.to, $("box-class").selectedIndex]] : rows;
      pen.lineWidth = (2 * pen.canvas.width) / (pen.canvas.clientWidth || pen.canvas.width);
      for (const [x0, y0, x1, y1, label] of drawn) {
        pen.strokeStyle = `rgb(${classes[label]?.color ?? [255, 255, 255]})`;
        pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
      }
    },
  };
}
