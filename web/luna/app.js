// The panel: creates the views and updates them with each message of the daemon.

import { el } from "./dom.js";
import { createActions } from "./actions.js";
import { createStore } from "./store.js";
import { createToasts } from "./toasts.js";
import { createAbsence } from "./views/absence.js";
import { createCharts } from "./views/charts.js";
import { createEvents } from "./views/events.js";
import { createFigures } from "./views/figures.js";
import { createHeader } from "./views/header.js";
import { createLoras } from "./views/loras.js";
import { createMemory } from "./views/memory.js";
import { createModels } from "./views/models.js";
import { createWorkers } from "./views/workers.js";

/**
 * Show the panel inside an element and keep its views up to date.
 * @param {HTMLElement|ShadowRoot} place
 * @param {object} options
 * @param {(body: object) => Promise<object|null>} options.call asks the daemon to change something
 * @param {(severity: string, text: string) => void} [options.toast] shows a message; by default the panel does
 * @param {ReturnType<typeof createStore>} [options.store] state that outlives the panel
 * @param {boolean} [options.sayStart] whether to say how a daemon is started while none answers
 * @returns {{root: HTMLElement, store: object, close: () => void}}
 */
export function mount(place, { call, toast, store = createStore(), sayStart = false }) {
  const style = el("link", { rel: "stylesheet", href: new URL("luna.css", import.meta.url).href });
  const root = el("div.luna");
  const say = toast ?? createToasts(root);
  const act = createActions(call, say);

  const header = createHeader(act);
  const absence = createAbsence(sayStart);
  const views = [
    createFigures(), createCharts(), createWorkers(), createModels(act), createMemory(), createLoras(act),
    createEvents(),
  ];
  const body = el("main", {}, ...views.map((view) => view.node));
  root.prepend(header.node, absence.node, body);
  place.append(style, root);

  const end = store.subscribe((state) => {
    root.dataset.link = state.link;
    header.update(state);
    absence.update(state);
    body.hidden = state.info === null;
    body.inert = state.link !== "live";
    if (state.info !== null && state.link === "live") views.forEach((view) => view.update(state));
  });
  return { root, store, close: () => (end(), style.remove(), root.remove()) };
}
