// State of the panel: the last status, a short history for the charts, and whether the daemon answers.

import { sentence } from "./sentences.js";

/** Length of the charts in seconds. */
export const WINDOW_S = 120;
const EVENTS = 30;
/** Ops that count as requests; the others only manage connections. */
const WORK = /^(vae|clip|lora|echo|models\.load)/;

/**
 * @typedef {object} State
 * @property {"connecting"|"live"|"away"} link
 * @property {string} why why the daemon is away, if that is known
 * @property {object|null} info the daemon's `info`
 * @property {Date|null} seen when `info` arrived
 * @property {Array<{at: number, throughput: number|null, latency: Object<string, number>}>} past per status:
 *   requests per second, and by op the median latency (ms) of the answers since the status before
 * @property {Array<{key: string, at: Date, kind: string, text: string}>} events newest first
 */

/**
 * Create the state, which notifies subscribers of each change.
 * @param {() => number} [now] milliseconds
 */
export function createStore(now = () => Date.now()) {
  /** @type {State} */
  const state = { link: "connecting", why: "", info: null, seen: null, past: [], events: [] };
  const subscribers = new Set();
  const answered = new Map();
  const notify = () => subscribers.forEach((subscriber) => subscriber(state));

  const apply = {
    status(info) {
      remember(state, info, answered, now());
      Object.assign(state, { link: "live", why: "", info, seen: new Date(now()) });
      (info.scaling ?? []).forEach((event) => happen("scaling", event));
    },
    request({ requests }) {
      for (const { op, seconds, result } of requests ?? []) {
        if (result !== "ok") continue;
        if (!answered.has(op)) answered.set(op, []);
        answered.get(op).push(1000 * seconds);
      }
      return false;
    },
    scaling: (event) => happen("scaling", event),
    error: (event) => happen("error", event),
    away: (about) => lose(about?.message),
  };

  function happen(kind, event) {
    const at = event.at ? 1000 * event.at : now();
    const key = `${kind} ${at} ${event.event ?? event.code} ${event.worker} ${event.op ?? ""}`;
    if (state.events.some((known) => known.key === key)) return;
    state.events.push({ key, at: new Date(at), kind, text: sentence(kind, event) });
    state.events.sort((a, b) => b.at - a.at);
    state.events.length = Math.min(state.events.length, EVENTS);
  }

  function lose(why = "") {
    Object.assign(state, { link: "away", why });
    answered.clear();
  }

  return {
    state,
    /** @param {(state: State) => void} subscriber called now and after each change @returns {() => void} unsubscribes */
    subscribe(subscriber) {
      subscribers.add(subscriber);
      subscriber(state);
      return () => subscribers.delete(subscriber);
    },
    /** Apply a message of the daemon. Unknown types belong to a later version and are ignored. */
    receive({ type, data }) {
      if (apply[type] !== undefined && apply[type](data ?? {}) !== false) notify();
    },
    /** Record that the connection is lost. */
    lose() {
      lose();
      notify();
    },
  };
}

/** Count the requests of all ops. @param {object} info @returns {number} */
export function workDone(info) {
  return Object.entries(info.requests ?? {}).reduce((sum, [op, n]) => sum + (WORK.test(op) ? n : 0), 0);
}

/** List the latency by op, the busiest op first. @param {object} info @returns {Array<[string, object]>} */
export function latencies(info) {
  const ops = Object.entries(info.latency ?? {}).filter(([op, { count }]) => WORK.test(op) && count > 0);
  return ops.sort(([a, x], [b, y]) => y.count - x.count || a.localeCompare(b));
}

function remember(state, info, answered, at) {
  if (state.link === "away" && state.past.length) state.past.push({ at: at - 1, throughput: null, latency: {}, gap: true });
  const medians = [...answered].map(([op, times]) => [op, times.sort((a, b) => a - b)[(times.length - 1) >> 1]]);
  answered.clear();
  state.past.push({ at, throughput: info.throughput_per_s ?? null, latency: Object.fromEntries(medians) });
  while (state.past[0].at < at - WINDOW_S * 1000) state.past.shift();
}
