// Table of the LoRAs in RAM: sorted by a click on a heading, with buttons to pin and evict.

import { attribute, card, el, keyed, text } from "../dom.js";
import { bytes, count, duration, leaf, span } from "../format.js";

const COLUMNS = [
  { name: "name", label: "LoRA", value: (lora) => leaf(lora.name).toLowerCase() },
  { name: "bytes", label: "Size", value: (lora) => lora.bytes ?? 0, show: (lora) => bytes(lora.bytes) },
  { name: "hits", label: "Hits", value: (lora) => lora.hits ?? 0, show: (lora) => count(lora.hits) },
  { name: "clients", label: "Clients", value: (lora) => lora.clients ?? -1, show: (lora) => count(lora.clients), wide: true },
  {
    name: "load_s", label: "Load time", value: (lora) => lora.load_s ?? -1, wide: true,
    show: (lora) => (lora.load_s ? duration(lora.load_s * 1000) : "–"),
  },
  {
    name: "last_used", label: "Last used", value: (lora) => lora.last_used ?? 0,
    show: (lora) => (lora.last_used ? `${span(Date.now() / 1000 - lora.last_used)} ago` : "–"),
  },
];

/** Create the table. @param {Function} act runs a call @returns {{node: HTMLElement, update: (state: object) => void}} */
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
  const none = el("p.empty", {}, "None in RAM yet. A LoRA that one client loads is kept here for all clients.");
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
    keyed(rows, sorted, (lora) => lora.name, (lora) => makeRow(lora, act), fill);
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

/** Create a row. Roles are explicit, since the grid layout of a narrow panel would remove the implied ones. */
function makeRow({ name }, act) {
  const cells = COLUMNS.slice(1).map((column) => el(`td${column.wide ? ".wide" : ""}`, { role: "cell" }));
  const short = leaf(name);
  const pin = el("button.bare.pin", {
    type: "button", title: "Keep this LoRA in RAM until it is unpinned",
    onclick: () => {
      const wanted = pin.getAttribute("aria-pressed") !== "true";
      act(pin, { op: "lora.pin", name, pinned: wanted }, wanted ? `${short} is pinned in RAM` : `${short} is no longer pinned`);
    },
  }, "Pin");
  const evict = el("button.bare", {
    type: "button", "aria-label": `Evict ${short}`, title: "Drop this LoRA from RAM; the next use reads the file again",
    onclick: () => act(evict, { op: "lora.evict", name }, `${short} is evicted from RAM`),
  }, "Evict");
  const heading = el("th", { scope: "row", role: "rowheader", title: name }, short);
  return el("tr", { role: "row", "data-lora": name }, heading, ...cells, el("td.actions", { role: "cell" }, pin, evict));
}

function fill(row, lora) {
  COLUMNS.slice(1).forEach((column, n) => text(row.cells[n + 1], column.show(lora)));
  const pin = row.querySelector(".pin");
  attribute(pin, "aria-pressed", String(Boolean(lora.pinned)));
  attribute(pin, "aria-label", `${lora.pinned ? "Unpin" : "Pin"} ${leaf(lora.name)}`);
  text(pin, lora.pinned ? "Pinned" : "Pin");
}
