// Dialog for the daemon's token, shown before the first change.

import { el } from "./dom.js";

/**
 * Ask the user for the token.
 * @param {HTMLElement} root where the dialog is shown
 * @returns {Promise<string>} the token; empty if the user cancelled
 */
export function askForToken(root) {
  const field = el("input", {
    type: "password", name: "token", autocomplete: "off", spellcheck: "false", required: true, "aria-label": "Token",
  });
  const form = el(
    "form", { method: "dialog" },
    el("h2", {}, "Enter the daemon’s token"),
    el("p", {}, "Viewing needs no token, but changing something does. On the daemon’s machine, this prints the token:"),
    el("code", {}, "luna-daemon token"),
    field,
    el(
      "div.buttons", {},
      el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      el("button.primary", { type: "submit", value: "ok" }, "Unlock"),
    ),
    el("p.quiet", {}, "The token is kept until this tab closes."),
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
