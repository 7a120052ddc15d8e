// The LoRAs in RAM: a table that sorts by its headings, with pin and evict.

import { attribute, card, el, keyed, text } from "../dom.js";
import { bytes, count, duration, leaf, span } from "../format.js";

const COLUMNS = [
  { name: "name", label: "LoRA", value: (one) => leaf(one.name).toLowerCase() },
  { name: "bytes", label: "Size", value: (one) => one.bytes ?? 0, show: (one) => bytes(one.bytes) },
  { name: "hits", label: "Hits", value: (one) => one.hits ?? 0, show: (one) => count(one.hits) },
  { name: "clients", label: "Clients", value: (one) => one.clients ?? -1, show: (one) => count(one.clients), wide: true },
  {
    name: "load_s", label: "Load", value: (one) => one.load_s ?? -1, wide: true,
    show: (one) => (one.load_s ? duration(one.load_s * 1000) : "–"),
  },
  {
    name: "last_used", label: "Used", value: (one) => one.last_used ?? 0,
    show: (one) => (one.last_used ? `${span(Date.now() / 1000 - one.last_used)} ago` : "–"),
  },
];

/** @param {Function} act @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createLoras(act) {
  let order = { by: "last_used", down: true };
  let latest = [];
  const rows = el("tbody", { role: "rowgroup" });
  const headings = COLUMNS.map((column) => {
    const button = el("button.sort", { type: "button", onclick: () => sort(column.name) }, column.label);
    return el(`th${column.wide ? ".wide" : ""}`, { scope: "col", role: "columnheader", "data-column": column.name }, button);
  });
  const last = el("th", { scope: "col", role: "columnheader" }, el("span.unseen", {}, "Actions"));
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...headings, last));
  const table = el("table.loras", { role: "table", "aria-labelledby": "luna-loras" }, head, rows);
  const none = el("p.empty", {}, "None in RAM yet. One that a client loads is kept here for all of them.");
  const node = card("loras", "LoRAs", none, table);

  function sort(by) {
    order = { by, down: order.by === by ? !order.down : by !== "name" };
    draw();
  }

  function draw() {
    const { value } = COLUMNS.find((column) => column.name === order.by);
    const sign = order.down ? -1 : 1;
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    const sorted = [...latest].sort((x, y) => sign * compare(value(x), value(y)) || compare(x.name, y.name));
    for (const heading of headings) {
      const by = heading.dataset.column === order.by;
      attribute(heading, "aria-sort", by ? (order.down ? "descending" : "ascending") : null);
    }
    keyed(rows, sorted, (one) => one.name, (one) => makeRow(one, act), fill);
  }

  function update({ info }) {
    const known = info.caches?.lora?.loras ?? {};
    latest = Object.entries(known).map(([name, facts]) => ({ ...facts, name }));
    none.hidden = latest.length > 0;
    table.hidden = latest.length === 0;
    draw();
  }
  return { node, update };
}

/** The roles are said aloud: in a narrow panel the rows are laid out as a grid, which would take them away. */
function makeRow({ name }, act) {
  const cells = COLUMNS.slice(1).map((column) => el(`td${column.wide ? ".wide" : ""}`, { role: "cell" }));
  const short = leaf(name);
  const pin = el("button.bare.pin", {
    type: "button",
    onclick: () => {
      const wanted = pin.getAttribute("aria-pressed") !== "true";
      act(pin, { op: "lora.pin", name, pinned: wanted }, wanted ? `${short} stays in RAM` : `${short} may leave RAM`);
    },
  }, "Pin");
  const evict = el("button.bare", {
    type: "button", "aria-label": `Evict ${short}`,
    onclick: () => act(evict, { op: "lora.evict", name }, `${short} is not in RAM any more`),
  }, "Evict");
  const heading = el("th", { scope: "row", role: "rowheader", title: name }, short);
  return el("tr", { role: "row", "data-lora": name }, heading, ...cells, el("td.actions", { role: "cell" }, pin, evict));
}

function fill(row, one) {
  COLUMNS.slice(1).forEach((column, n) => text(row.cells[n + 1], column.show(one)));
  const pin = row.querySelector(".pin");
  attribute(pin, "aria-pressed", String(Boolean(one.pinned)));
  attribute(pin, "aria-label", `${one.pinned ? "Unpin" : "Pin"} ${leaf(one.name)}`);
  text(pin, one.pinned ? "Pinned" : "Pin");
}
