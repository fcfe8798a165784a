// The large view: one canvas that is panned and zoomed, two sides of a divider, and the pixel that was picked.

import { $, clamp } from "./elements.js";

const STEP = 1.25, MOST = 64, CLICK_PX = 4;

/** size(): [width, height] of the picture or nothing. draw(pen, side): draws it in its own pixels. picked({x, y}) and
    hovered({x, y} or nothing): told of pixels. tool: what takes drags before they pan: {down, move, up,
    cancel}. */
export function makeView({ size, draw, picked, hovered, tool }) {
  const canvas = $("view"), pointers = new Map();
  let zoom = 1, left = 0, top = 0, split = 0.5, pixel, drag, isDue = false;

  const placeOf = (event) => {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top].map((px) => px * devicePixelRatio);
    return { x, y, at: [(x - left) / zoom, (y - top) / zoom] };
  };

  function fit() {
    if (!size()) return redraw();
    const [width, height] = size();
    zoom = Math.min(canvas.width / width, canvas.height / height);
    [left, top] = [(canvas.width - width * zoom) / 2, (canvas.height - height * zoom) / 2];
    redraw();
  }

  function scaleTo(next, x = canvas.width / 2, y = canvas.height / 2) {
    if (!size()) return;
    const least = 0.5 * Math.min(canvas.width / size()[0], canvas.height / size()[1]), bounded = clamp(next, Math.min(least, 1), MOST);
    [left, top] = [x - ((x - left) * bounded) / zoom, y - ((y - top) * bounded) / zoom];
    if (bounded === 1) [left, top] = [Math.round(left), Math.round(top)];
    zoom = bounded;
    redraw();
  }

  function redraw() {
    if (!isDue) requestAnimationFrame(paint);
    isDue = true;
  }

  function paint() {
    isDue = false;
    const pen = canvas.getContext("2d"), at = Math.round(split * canvas.width);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    Object.assign(canvas.dataset, { left, top, zoom });
    $("zoom-shown").value = size() ? `${Math.round(100 * zoom)} %` : "";
    if (!size()) return;
    for (const [side, from, width] of [["left", 0, at], ["right", at, canvas.width - at]]) {
      pen.save();
      pen.beginPath();
      pen.rect(from, 0, width, canvas.height);
      pen.clip();
      pen.setTransform(zoom, 0, 0, zoom, left, top);
      pen.imageSmoothingEnabled = zoom < 1;
      draw(pen, side, zoom);
      pen.restore();
    }
    if (pixel) drawCross(pen);
  }

  function drawCross(pen) {
    const [x, y] = [left + (pixel.x + 0.5) * zoom, top + (pixel.y + 0.5) * zoom], radius = Math.max(7, 0.7 * zoom);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    for (const [width, tone] of [[4, "#000"], [2, "#fff"]]) {
      Object.assign(pen, { lineWidth: width * devicePixelRatio, strokeStyle: tone });
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.stroke();
    }
  }

  function pick(x, y) {
    const [width, height] = size();
    pixel = { x: clamp(Math.floor(x), 0, width - 1), y: clamp(Math.floor(y), 0, height - 1) };
    picked(pixel);
    redraw();
  }

  function down(event) {
    if (!size() || event.button > 0) return;
    canvas.setPointerCapture(event.pointerId);
    const place = placeOf(event);
    pointers.set(event.pointerId, place);
    if (drag?.byTool) tool.cancel();
    hold({ hasMoved: pointers.size > 1, byTool: pointers.size === 1 && tool.down(place.at, zoom) });
  }

  /** Where a drag goes on from: at its first finger, and whenever another one joins or leaves. */
  function hold({ hasMoved, byTool }) {
    drag = { from: pointers.values().next().value, left, top, zoom, apart: apart(), hasMoved, byTool };
  }

  /** How far the first two fingers are from each other; never 0. */
  function apart() {
    const [one, other = one] = pointers.values();
    return Math.hypot(one.x - other.x, one.y - other.y) || 1;
  }

  function move(event) {
    if (!size()) return;
    const place = placeOf(event), [x, y] = place.at.map(Math.floor);
    if (!pointers.has(event.pointerId)) {
      const [width, height] = size();
      return hovered(x >= 0 && y >= 0 && x < width && y < height ? { x, y } : undefined);
    }
    pointers.set(event.pointerId, place);
    if (pointers.size > 1) return scaleTo((drag.zoom * apart()) / drag.apart, place.x, place.y);
    if (Math.hypot(place.x - drag.from.x, place.y - drag.from.y) > CLICK_PX) drag.hasMoved = true;
    if (drag.hasMoved && drag.byTool) tool.move(place.at);
    else if (drag.hasMoved) [left, top] = [drag.left + place.x - drag.from.x, drag.top + place.y - drag.from.y];
    redraw();
  }

  function up(event) {
    if (!pointers.delete(event.pointerId) || !drag) return;
    const isUp = event.type === "pointerup";
    if (drag.byTool) tool[isUp ? "up" : "cancel"]();
    if (!drag.hasMoved && isUp) pick(...placeOf(event).at);
    if (pointers.size) hold({ hasMoved: true, byTool: false });
    else drag = undefined;
    redraw();
  }

  function key(event) {
    if (!size()) return;
    const far = event.shiftKey ? 10 : 1;
    const [dx, dy] = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] }[event.key] ?? [];
    const act = { "+": () => scaleTo(zoom * STEP), "-": () => scaleTo(zoom / STEP), 0: fit, 1: () => scaleTo(1) }[event.key];
    if (dx === undefined && !act) return;
    event.preventDefault();
    const from = pixel ?? { x: size()[0] >> 1, y: size()[1] >> 1 };
    if (act) act();
    else pick(from.x + dx, from.y + dy);
  }

  function setSplit(share) {
    split = clamp(share, 0, 1);
    $("divider").style.left = `${100 * split}%`;
    $("divider").setAttribute("aria-valuenow", Math.round(100 * split));
    redraw();
  }

  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, up);
  canvas.addEventListener("pointerleave", () => hovered());
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = placeOf(event);
    scaleTo(zoom * STEP ** (-event.deltaY / 100), x, y);
  }, { passive: false });
  $("zoom-in").addEventListener("click", () => scaleTo(zoom * STEP));
  $("zoom-out").addEventListener("click", () => scaleTo(zoom / STEP));
  $("zoom-fit").addEventListener("click", fit);
  $("zoom-one").addEventListener("click", () => scaleTo(1));
  const slide = $("divider");
  slide.addEventListener("pointerdown", (event) => slide.setPointerCapture(event.pointerId));
  slide.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    if (slide.hasPointerCapture(event.pointerId)) setSplit((event.clientX - frame.left) / frame.width);
  });
  slide.addEventListener("keydown", ({ key }) => {
    const step = { ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1 }[key];
    if (step) setSplit(split + step);
  });
  new ResizeObserver(() => {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((px) => Math.round(px * devicePixelRatio));
    if (width === canvas.width && height === canvas.height) return;
    Object.assign(canvas, { width, height });
    fit();
  }).observe(canvas);

  return {
    redraw, pixel: () => pixel,
    /** Another picture: seen as a whole, without a pixel. */
    begin() {
      pixel = undefined;
      fit();
    },
  };
}
