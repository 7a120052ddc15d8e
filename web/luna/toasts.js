// Short messages at the foot of the daemon's page; in ComfyUI its own toasts are used instead.

import { el } from "./dom.js";

const SHOWN_MS = 8000;

/**
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
