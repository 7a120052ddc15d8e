// The daemon's own page. An `.mjs` file, because ComfyUI imports every `.js` file below this folder.

import { mount } from "./luna/app.js";
import { link } from "./luna/link.js";
import { followSystem } from "./luna/theme.js";
import { askForToken } from "./luna/token.js";

const TOKEN = "luna-token";

const place = document.getElementById("luna");
const panel = mount(place, { call, sayStart: true });
followSystem(panel.root);
link(new URL("ws", location.href), panel.store);

/**
 * Send a change to the daemon, with the token that the user enters once per browser session.
 * @param {object} body the op and its fields
 * @returns {Promise<object|null>} the answer, or null if the user entered no token
 */
async function call(body) {
  const token = sessionStorage.getItem(TOKEN) ?? (await askForToken(panel.root));
  if (!token) return null;
  const answer = await fetch("api/call", {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
    body: JSON.stringify(body),
  });
  if (answer.status === 401 || answer.status === 403) sessionStorage.removeItem(TOKEN);
  else sessionStorage.setItem(TOKEN, token);
  return answer.json();
}
