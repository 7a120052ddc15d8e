// Memory of each GPU, the caches, the shared memory that carries tensors, and the daemon's process.

import { attribute, card, el, keyed, text } from "../dom.js";
import { bytes, count, share } from "../format.js";

/** Create the bars. @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createMemory() {
  const gpus = el("ul.bars", { "data-field": "gpus" });
  const noGpu = el("p.empty", { "data-field": "no-gpu" }, "No GPU");
  const rest = el("ul.bars", { "data-field": "memory" });
  const node = card("memory", "Memory", noGpu, gpus, rest);

  function update({ info }) {
    const cards = info.gpus ?? [];
    noGpu.hidden = cards.length > 0;
    keyed(gpus, cards, (gpu) => gpu.uuid ?? gpu.index, makeBar, (bar, gpu) =>
      fill(bar, `GPU ${gpu.index}`, gpu.name ?? "", gpu.used, gpu.total),
    );
    keyed(rest, shared(info), ({ name }) => name, makeBar, (bar, { name, note, used, total }) =>
      fill(bar, name, note, used, total),
    );
  }
  return { node, update };
}

function shared({ caches = {}, arena = {}, rss }) {
  const bars = [];
  for (const [name, cache] of [["Prompt cache", caches.conditioning], ["LoRA cache", caches.lora]]) {
    if (cache) bars.push({ name, note: usage(cache), used: cache.bytes, total: cache.max_bytes });
  }
  const { used, max_bytes: total } = arena;
  if (total) bars.push({ name: "Shared memory", note: "tensors in transit", used, total });
  if (rss) bars.push({ name: "Daemon process", note: "", used: rss, total: null });
  return bars;
}

function usage({ entries, hits, misses }) {
  const lookups = hits + misses;
  return [entries ? `${count(entries)} ${entries === 1 ? "entry" : "entries"}` : "empty", lookups ? `${share(hits, misses)} hits` : ""].filter(Boolean).join(", ");
}

function makeBar() {
  const meter = el("div.meter", { role: "meter", "aria-valuemin": 0 }, el("i"));
  return el("li", {}, el("span.name"), el("span.quiet.note"), el("span.amount"), meter);
}

function fill(bar, name, note, used, total) {
  const [label, remark, amount, meter] = bar.children;
  text(label, name);
  text(remark, note);
  text(amount, total ? `${bytes(used)} of ${bytes(total)}` : bytes(used));
  meter.hidden = !total;
  if (!total) return;
  const part = Math.min(1, used / total);
  attribute(meter, "aria-label", name);
  attribute(meter, "aria-valuemax", total);
  attribute(meter, "aria-valuenow", used);
  attribute(meter, "aria-valuetext", amount.textContent);
  attribute(meter, "data-tone", part > 0.95 ? "bad" : part > 0.85 ? "warn" : null);
  meter.firstChild.style.width = used > 0 ? `max(2px, ${(100 * part).toFixed(2)}%)` : "0";
}
