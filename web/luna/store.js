// What the panel knows: the last status, a short past for the charts, and whether the daemon is there.

import { sentence } from "./sentences.js";

/** Seconds that the charts show. */
export const WINDOW_S = 120;
const EVENTS = 30;
/** Ops that are work; the rest is housekeeping of connections. */
const WORK = /^(vae|clip|lora|echo|models\.load)/;

/**
 * @typedef {object} State
 * @property {"connecting"|"live"|"away"} link
 * @property {string} why what is known about an absence
 * @property {object|null} info the daemon's `info`
 * @property {Date|null} seen when it came
 * @property {Array<{at: number, throughput: number|null, latency: Object<string, number>}>} past one for each status:
 *   requests per second, and by op the median (ms) of what was answered since the one before
 * @property {Array<{key: string, at: Date, kind: string, text: string}>} events newest first
 */

/**
 * Keeps the state and tells subscribers of each change.
 * @param {() => number} [now] milliseconds
 */
export function createStore(now = () => Date.now()) {
  /** @type {State} */
  const state = { link: "connecting", why: "", info: null, seen: null, past: [], events: [] };
  const subscribers = new Set();
  const answered = new Map();
  const tell = () => subscribers.forEach((subscriber) => subscriber(state));

  const take = {
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
    /** @param {(state: State) => void} subscriber called now and after each change @returns {() => void} ends it */
    subscribe(subscriber) {
      subscribers.add(subscriber);
      subscriber(state);
      return () => subscribers.delete(subscriber);
    },
    /** A message of the daemon. One of a type that is not known is of a later version, and no harm. */
    receive({ type, data }) {
      if (take[type] !== undefined && take[type](data ?? {}) !== false) tell();
    },
    /** The connection is gone. */
    lose() {
      lose();
      tell();
    },
  };
}

/** @param {object} info @returns {number} requests for work, of all ops */
export function workDone(info) {
  return Object.entries(info.requests ?? {}).reduce((sum, [op, n]) => sum + (WORK.test(op) ? n : 0), 0);
}

/** @param {object} info @returns {Array<[string, object]>} latency of work by op, the busiest first */
export function latencies(info) {
  const known = Object.entries(info.latency ?? {}).filter(([op, facts]) => WORK.test(op) && facts.count > 0);
  return known.sort(([a, x], [b, y]) => y.count - x.count || a.localeCompare(b));
}

function remember(state, info, answered, at) {
  if (state.link === "away" && state.past.length) state.past.push({ at: at - 1, throughput: null, latency: {}, gap: true });
  const medians = [...answered].map(([op, times]) => [op, times.sort((a, b) => a - b)[(times.length - 1) >> 1]]);
  answered.clear();
  state.past.push({ at, throughput: info.throughput_per_s ?? null, latency: Object.fromEntries(medians) });
  while (state.past[0].at < at - WINDOW_S * 1000) state.past.shift();
}
