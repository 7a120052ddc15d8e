// Workers, one card each: device, state, models, memory, requests, last error.

import { attribute, card, el, keyed, text } from "../dom.js";
import { bytes, count, modelName, span } from "../format.js";

/** Create the cards. @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createWorkers() {
  const list = el("ul.workers");
  const none = el("p.empty", {}, "No workers yet: they start at the first request.");
  const node = card("workers", "Workers", none, list);

  function update({ info }) {
    const workers = info.workers ?? [];
    none.hidden = workers.length > 0;
    keyed(list, workers, (worker) => worker.number, make, fill);
  }
  return { node, update };
}

function make(worker) {
  const field = (name, tag = "span") => el(tag, { "data-field": name });
  return el(
    "li.worker", { "data-worker": worker.number },
    el("h3", {}, `Worker ${worker.number} `, el("span.chip", { "data-field": "device" }), el("span.state", { "data-field": "state" })),
    el("ul.models", { "data-field": "models" }),
    el("p.quiet", {}, field("memory"), field("requests"), field("idle")),
    el("p.trouble", { "data-field": "last_error" }),
  );
}

function fill(node, worker) {
  const at = (name) => node.querySelector(`[data-field="${name}"]`);
  attribute(node, "data-state", worker.state);
  text(at("device"), worker.device ?? "");
  text(at("state"), worker.state ?? "");
  const models = Object.entries(worker.models ?? {});
  keyed(at("models"), models.length ? models : [["", null]], ([key]) => key, makeModel, (item, [, nbytes]) =>
    text(item.lastChild, nbytes === null ? "" : bytes(nbytes)),
  );
  text(at("memory"), `${bytes(worker.rss)} RAM`);
  text(at("requests"), `${count(worker.requests)} request${worker.requests === 1 ? "" : "s"}`);
  text(at("idle"), worker.idle_s > 1 ? `idle ${span(worker.idle_s)}` : "");
  const trouble = worker.last_error;
  text(at("last_error"), trouble ? words(trouble) : "");
  at("last_error").hidden = !trouble;
}

function makeModel([key]) {
  const { kind, name } = modelName(key);
  const what = key ? el("span", {}, el("b", {}, name), ` ${kind} `) : el("span.quiet", {}, "no model loaded");
  return el("li", {}, what, el("span.quiet"));
}

function words(trouble) {
  return typeof trouble === "string" ? trouble : (trouble.message ?? JSON.stringify(trouble));
}
