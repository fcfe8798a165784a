// Boxes: drawn by mouse on the image, or typed. Corners in pixels of the picture.

/** $: element by id. page(): {bitmap, drawAgain}. */
export function boxEditor($, page) {
  let rows = [], classes = [], drag;

  function list() {
    $("boxes").replaceChildren(...rows.map((row, i) => {
      const item = document.createElement("li"), remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove box ${i + 1}`);
      remove.addEventListener("click", () => change(rows.filter((other) => other !== row)));
      item.append(`${classes[row[4]].name} ${row.slice(0, 4).join(", ")} `, remove);
      return item;
    }));
  }

  function change(next) {
    rows = next;
    list();
    page().drawAgain();
  }

  function add(x0, y0, x1, y1) {
    const { bitmap } = page();
    const within = (value, size) => Math.max(0, Math.min(size, Math.round(value)));
    const corners = [[x0, x1, bitmap.width], [y0, y1, bitmap.height]].map(([a, b, size]) => [within(Math.min(a, b), size), within(Math.max(a, b), size)]);
    const [[left, right], [top, bottom]] = corners;
    if (right > left && bottom > top) change([...rows, [left, top, right, bottom, $("box-class").selectedIndex]]);
  }

  function place({ clientX, clientY }) {
    const frame = $("image").getBoundingClientRect(), { bitmap } = page();
    return [((clientX - frame.left) / frame.width) * bitmap.width, ((clientY - frame.top) / frame.height) * bitmap.height];
  }

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
    const done = drag;
    drag = undefined;
    if (done) add(...done.from, ...done.to);
  });
  $("image").addEventListener("pointercancel", () => (drag = undefined));
  $("box-add").addEventListener("click", () => page().bitmap && add(...["x0", "y0", "x1", "y1"].map((id) => Number($(id).value))));

  return {
    /** Another model: its classes, and no boxes. */
    begin(known) {
      classes = known;
      $("image").classList.toggle("drawing", !$("boxes-row").hidden);
      $("box-class").replaceChildren(...classes.map(({ name }) => new Option(name)));
      this.clear();
    },
    clear() {
      rows = [];
      list();
    },
    /** [[x0, y0, x1, y1, class], ...] */
    rows: () => rows,
    draw(pen) {
      const scale = pen.canvas.width / (pen.canvas.clientWidth || pen.canvas.width);
      const outline = ([x0, y0, x1, y1, label]) => {
        pen.lineWidth = 2 * scale;
        pen.strokeStyle = `rgb(${classes[label]?.color ?? [255, 255, 255]})`;
        pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
      };
      rows.forEach(outline);
      if (drag) outline([...drag.from, ...drag.to, $("box-class").selectedIndex]);
    },
  };
}
