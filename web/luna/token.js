// The daemon's token, asked for when something is to be changed.

import { el } from "./dom.js";

/**
 * @param {HTMLElement} root where the dialog is shown
 * @returns {Promise<string>} what was entered; empty if the user left
 */
export function askForToken(root) {
  const field = el("input", {
    type: "password", name: "token", autocomplete: "off", spellcheck: "false", required: true, "aria-label": "Token",
  });
  const form = el(
    "form", { method: "dialog" },
    el("h2", {}, "The token, please"),
    el("p", {}, "Looking is free; changing something needs the daemon’s token. This shows it:"),
    el("code", {}, "luna-daemon token"),
    field,
    el(
      "div.buttons", {},
      el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      el("button.primary", { type: "submit", value: "ok" }, "Unlock"),
    ),
    el("p.quiet", {}, "It is kept until this tab closes."),
  );
  const dialog = el("dialog", { "aria-label": "Token" }, form);
  root.append(dialog);
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? field.value.trim() : "");
      dialog.remove();
    });
  });
}
