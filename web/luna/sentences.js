// Events of the daemon as sentences.

import { bytes } from "./format.js";

const WORDS = {
  worker_started: "starts", worker_ready: "is ready", worker_stopped: "has stopped", worker_crashed: "crashed",
  model_loaded: "loaded", model_unloaded: "unloaded", model_evicted: "evicted",
};
const REASONS = { asked: "on request" };

/**
 * Word an event.
 * @param {"scaling"|"error"} kind
 * @param {object} event the daemon's message
 * @returns {string}
 */
export function sentence(kind, event) {
  return kind === "error" ? trouble(event) : scaling(event);
}

function scaling({ event, worker, model, why, bytes: size }) {
  const text = [`Worker ${worker}`, WORDS[event] ?? String(event).replaceAll("_", " "), model].filter(Boolean).join(" ");
  return [text, Number.isFinite(size) ? bytes(size) : "", REASONS[why] ?? why].filter(Boolean).join(", ");
}

function trouble({ code, message, hint, op, model }) {
  const where = [op, model].filter(Boolean).join(" ");
  const what = message || String(code ?? "error").replaceAll("_", " ");
  return [where ? `${where}: ${what}` : what, hint].filter(Boolean).join(". ");
}
