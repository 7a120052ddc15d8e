// Throughput and latency of the last two minutes, and latency by op.

import { attribute, card, el, keyed, text } from "../dom.js";
import { createChart } from "../chart.js";
import { count, duration, rate } from "../format.js";
import { latencies } from "../store.js";

const TONES = ["a", "b", "c", "d"];
const BRIDGED_MS = 8000;

/** @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createCharts() {
  const throughput = createChart("Requests per second, the last two minutes", rate);
  const latency = createChart("Latency by op, the last two minutes", duration, true);
  const rows = el("tbody");
  const head = ["op", "requests", "median", "95 %"].map((name) => el("th", { scope: "col" }, name));
  const table = el("table.ops", {}, el("thead", {}, el("tr", {}, ...head)), rows);
  const node = card(
    "charts", "Pace",
    el("h3", {}, "Requests per second"), throughput.node,
    el("h3", {}, "Latency ", el("span.quiet", {}, "median, second by second")), latency.node, table,
  );
  const tones = new Map();

  function toneOf(op) {
    if (!tones.has(op)) tones.set(op, TONES[tones.size % TONES.length]);
    return tones.get(op);
  }

  function update({ info, past }) {
    const now = past.at(-1)?.at ?? 0;
    const since = past[0]?.at ?? 0;
    const pace = past.map(({ at, throughput }) => [at, throughput]);
    throughput.draw([{ name: "all", tone: "a", area: true, points: pace }], since, now);
    const ops = latencies(info);
    latency.draw(
      ops.slice(0, TONES.length).map(([op]) => ({ name: op, tone: toneOf(op), points: bridged(past, op) })),
      since,
      now,
    );
    table.hidden = ops.length === 0;
    keyed(rows, ops, ([op]) => op, makeRow, (row, [op, facts]) => {
      attribute(row, "data-op", op);
      row.cells[0].firstChild.className = `swatch ${toneOf(op)}`;
      text(row.cells[1], count(facts.count));
      text(row.cells[2], duration(facts.p50_ms));
      text(row.cells[3], duration(facts.p95_ms));
    });
  }
  return { node, update };
}

/** Latency of an op over time: a line over short pauses, none over long ones or while the daemon was away. */
function bridged(past, op) {
  const points = [];
  let last = null;
  for (const { at, latency, gap } of past) {
    const value = latency[op];
    if (value === undefined && !gap) continue;
    if (gap || (last !== null && at - last > BRIDGED_MS)) points.push([at, null]);
    if (gap) continue;
    points.push([at, value]);
    last = at;
  }
  return points;
}

function makeRow([op]) {
  return el("tr", {}, el("th", { scope: "row" }, el("i.swatch"), op), el("td"), el("td"), el("td"));
}
