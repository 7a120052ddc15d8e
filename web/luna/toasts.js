// Short messages at the foot of the daemon's page; the panel in ComfyUI uses ComfyUI's toasts instead.

import { el } from "./dom.js";

const SHOWN_MS = 8000;

/**
 * Create the place for messages, and the function that shows one.
 * @param {HTMLElement} root
 * @returns {(severity: "info"|"success"|"error", text: string) => void}
 */
export function createToasts(root) {
  const place = el("div.toasts", { role: "status", "aria-live": "polite" });
  root.append(place);
  return (severity, text) => {
    const toast = el("div.toast", { "data-severity": severity }, el("span", {}, text));
    toast.append(el("button.bare", { type: "button", "aria-label": "Dismiss", onclick: () => toast.remove() }, "×"));
    place.append(toast);
    setTimeout(() => toast.remove(), SHOWN_MS);
  };
}
