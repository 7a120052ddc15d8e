// Throughput and latency of the last two minutes, and latency by op.

import { attribute, card, el, keyed, text } from "../dom.js";
import { createChart } from "../chart.js";
import { count, duration, rate } from "../format.js";
import { latencies } from "../store.js";

const TONES = ["a", "b", "c", "d"];
const BRIDGED_MS = 8000;

/** Create the charts and the table of latencies. @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createCharts() {
  const throughput = createChart("Requests per second, the last two minutes", rate);
  const latency = createChart("Latency by op, the last two minutes", power, true);
  const rows = el("tbody");
  const head = [
    ["op", "The kind of call, as the protocol names it"], ["requests"], ["median"],
    ["p95", "95 % of the requests took no longer than this"],
  ].map(([name, title = null]) =>
    el("th", { scope: "col", title }, name),
  );
  const table = el("table.ops", {}, el("thead", {}, el("tr", {}, ...head)), rows);
  const node = card(
    "charts", "Throughput and latency",
    el("h3", {}, "Requests per second"), throughput.node,
    el("h3", {}, "Latency ", el("span.quiet", {}, "median per second")), latency.node, table,
  );
  const tones = new Map();

  /** Assign colours; an op keeps a colour for as long as the op is drawn. */
  function assign(drawn) {
    for (const op of tones.keys()) if (!drawn.includes(op)) tones.delete(op);
    for (const op of drawn) {
      const taken = [...tones.values()];
      if (!tones.has(op)) tones.set(op, TONES.find((tone) => !taken.includes(tone)));
    }
  }

  function update({ info, past }) {
    const now = past.at(-1)?.at ?? 0;
    const since = past[0]?.at ?? 0;
    const rates = past.map(({ at, throughput }) => [at, throughput]);
    throughput.draw([{ name: "all", tone: "a", area: true, points: rates }], since, now);
    const ops = latencies(info);
    const drawn = ops.slice(0, TONES.length).map(([op]) => op);
    assign(drawn);
    latency.draw(drawn.map((op) => ({ name: op, tone: tones.get(op), points: bridged(past, op) })), since, now);
    table.hidden = ops.length === 0;
    keyed(rows, ops, ([op]) => op, makeRow, (row, [op, facts]) => {
      attribute(row, "data-op", op);
      row.cells[0].firstChild.className = `swatch ${tones.get(op) ?? "none"}`;
      text(row.cells[1], count(facts.count));
      text(row.cells[2], duration(facts.p50_ms));
      text(row.cells[3], duration(facts.p95_ms));
    });
  }
  return { node, update };
}

/** Format a power of ten at the grid, which needs no minutes. */
function power(ms) {
  return ms >= 1000 ? `${ms / 1000} s` : duration(ms);
}

/** Points of an op's latency: connected over short pauses, but not over long ones or an absence of the daemon. */
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
