// A small line chart in SVG of the last two minutes; time runs to the right.

import { attribute, el, keyed, svg, text } from "./dom.js";
import { WINDOW_S } from "./store.js";

const WIDTH = 600;
const HEIGHT = 120;
const MARKS = 3;
const LEAST_S = 30;

/**
 * @typedef {object} Line
 * @property {string} name
 * @property {string} tone a class: `a`, `b`, `c`, `d`
 * @property {boolean} [area] whether the area below the line is filled
 * @property {Array<[number, number|null]>} points milliseconds and value; null is a gap
 */

/**
 * Create a line chart.
 * @param {string} label description of the chart for screen readers
 * @param {(value: number) => string} format text of a value at the grid
 * @param {boolean} [logarithmic] scale by powers of ten
 * @returns {{node: HTMLElement, draw: (lines: Line[], since: number, now: number) => void}}
 */
export function createChart(label, format, logarithmic = false) {
  const grid = svg("g.grid");
  const paths = svg("g");
  const picture = svg(
    "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    grid, paths,
  );
  const ticks = el("div.ticks", { "aria-hidden": true });
  const waiting = el("p.quiet.waiting", {}, "This page has seen no requests in the last two minutes");
  const node = el("div.chart", {}, picture, ticks, waiting);

  function draw(lines, since, now) {
    const values = lines.flatMap((line) => line.points.map(([, value]) => value)).filter((v) => v !== null);
    const scale = (logarithmic ? decades : linear)(values);
    const seconds = Math.min(WINDOW_S, Math.max(LEAST_S, (now - since) / 1000));
    const x = (at) => WIDTH - ((now - at) / (seconds * 1000)) * WIDTH;
    const y = (value) => HEIGHT - 2 - scale.place(value) * (HEIGHT - 6);
    waiting.hidden = values.length > 0;
    const marks = values.length ? scale.marks : [];
    keyed(grid, marks.map((at) => ({ at })), ({ at }) => at, () => svg("line"), (mark, { at }) => {
      for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", y(at)], ["y2", y(at)]]) attribute(mark, name, value);
    });
    keyed(ticks, marks.map((at) => ({ at })), ({ at }) => at, () => el("span"), (tick, { at }) => {
      text(tick, format(at));
      tick.style.top = `${(100 * y(at)) / HEIGHT}%`;
    });
    const shapes = lines.flatMap((line) => (line.area ? [{ ...line, fill: true }, line] : [line]));
    keyed(paths, shapes, (s) => `${s.name}${s.fill ? " area" : ""}`, () => svg("path"), (path, shape) => {
      attribute(path, "class", `line ${shape.tone}${shape.fill ? " fill" : ""}`);
      attribute(path, "d", runs(shape.points).map((run) => outline(run, x, y, shape.fill)).join(""));
    });
  }

  return { node, draw };
}

/** Split points into runs without gaps. */
function runs(points) {
  const split = [[]];
  for (const [at, value] of points) {
    if (value === null) split.push([]);
    else split.at(-1).push([at, value]);
  }
  return split.filter((run) => run.length > 0);
}

function outline(run, x, y, fill) {
  const dots = run.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
  if (dots.length === 1) dots.push(`${(x(run[0][0]) + 1).toFixed(1)},${y(run[0][1]).toFixed(1)}`);
  const line = `M${dots.join("L")}`;
  return fill ? `${line}L${x(run[run.length - 1][0]).toFixed(1)},${HEIGHT}L${x(run[0][0]).toFixed(1)},${HEIGHT}Z` : line;
}

/** Scale from zero to a round number at or above the highest value; to 1 if all values are zero. */
function linear(values) {
  const highest = Math.max(0, ...values) || 1;
  const power = 10 ** Math.floor(Math.log10(highest));
  const top = [1, 2, 5, 10].map((step) => step * power).find((step) => step >= highest * 0.999);
  return { place: (value) => value / top, marks: [top / 2, top] };
}

/** Scale by powers of ten that enclose the values. */
function decades(values) {
  const positive = values.filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...positive, 1e9)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...positive, 1e-9))));
  const marks = [];
  const step = Math.ceil((high - low) / MARKS);
  for (let power = high; power >= low; power -= step) marks.push(10 ** power);
  const place = (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low);
  return { place, marks };
}
