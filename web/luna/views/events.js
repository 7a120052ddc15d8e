// Recent events: workers and models that came and went, requests that failed.

import { attribute, card, el, keyed, text } from "../dom.js";
import { clock } from "../format.js";

const SHOWN = 8;

/** Create the list of events. @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createEvents() {
  const list = el("ol.events");
  const none = el("p.empty", {}, "No events yet.");
  const node = card("events", "Recent events", none, list);

  function update({ events }) {
    none.hidden = events.length > 0;
    const shown = events.slice(0, SHOWN);
    keyed(list, shown, (event) => event.key, make, () => {});
  }
  return { node, update };
}

function make(event) {
  const time = el("time.quiet");
  const words = el("span");
  text(time, clock(event.at));
  text(words, event.text);
  const item = el("li", {}, time, words);
  attribute(item, "data-kind", event.kind);
  return item;
}
