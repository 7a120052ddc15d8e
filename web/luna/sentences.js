// Events of the daemon in words.

import { bytes } from "./format.js";

const WORDS = {
  worker_started: "starts", worker_ready: "is ready", worker_stopped: "has ended", worker_crashed: "crashed",
  model_loaded: "loaded", model_unloaded: "unloaded", model_evicted: "made room:",
};

/**
 * @param {"scaling"|"error"} kind
 * @param {object} event as the daemon sent it
 * @returns {string}
 */
export function sentence(kind, event) {
  return kind === "error" ? trouble(event) : scaling(event);
}

function scaling({ event, worker, model, why, bytes: size }) {
  const text = [`Worker ${worker}`, WORDS[event] ?? String(event).replaceAll("_", " "), model].filter(Boolean).join(" ");
  return [text, Number.isFinite(size) ? bytes(size) : "", why].filter(Boolean).join(", ");
}

function trouble({ code, message, hint, op, model }) {
  const where = [op, model].filter(Boolean).join(" ");
  const what = message || String(code ?? "error").replaceAll("_", " ");
  return [where ? `${where}: ${what}` : what, hint].filter(Boolean).join(". ");
}
