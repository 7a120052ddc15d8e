// The daemon's own page. It is no `.js` file: ComfyUI imports each of those below this folder, and this is not for it.

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
 * Ask the daemon to change something, with the token that the user is asked for once per browser session.
 * @param {object} body the op and its fields
 * @returns {Promise<object|null>} the answer, or null if the user gave no token
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
