// Key statistics, in one line of tiles.

import { attribute, el, text } from "../dom.js";
import { count, duration, rate } from "../format.js";
import { workDone } from "../store.js";

/** Create the tiles. @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createFigures() {
  const tiles = {};
  const node = el("dl.figures", { "data-part": "figures" });
  for (const [name, label] of [
    ["throughput", "requests/s"], ["requests", "requests"], ["in_flight", "in flight"], ["queue", "queued"],
    ["clients", "clients"], ["fallbacks", "fallbacks"],
  ]) {
    const value = el("dd", { "data-field": name });
    const note = el("span.quiet");
    tiles[name] = { value, note };
    node.append(el("div", {}, el("dt", {}, label), value, note));
  }

  function set(name, value, note = "", tone = null) {
    text(tiles[name].value, value);
    text(tiles[name].note, note);
    attribute(tiles[name].value, "data-tone", tone);
  }

  function update({ info, past }) {
    const errors = Object.values(info.errors ?? {}).reduce((sum, n) => sum + n, 0);
    const queue = info.queue ?? {};
    const full = queue.limit > 0 && queue.waiting >= 0.8 * queue.limit;
    set("throughput", rate(past.at(-1)?.throughput ?? 0));
    set("requests", count(workDone(info)), errors ? `${count(errors)} failed` : "none failed", errors ? "warn" : null);
    set("in_flight", count(info.in_flight));
    set(
      "queue", count(queue.waiting),
      queue.waiting ? `oldest ${duration(queue.oldest_s * 1000)}` : `limit ${count(queue.limit)}`,
      full ? "bad" : null,
    );
    set("clients", count(info.clients?.length));
    set("fallbacks", count(info.fallbacks), info.fallbacks ? "computed by clients" : "", info.fallbacks ? "warn" : null);
  }
  return { node, update };
}
