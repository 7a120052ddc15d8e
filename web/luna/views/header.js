// The top line: the moon, state, uptime and version, and the button that drains the daemon.

import { attribute, el, svg, text } from "../dom.js";
import { confirmFirst } from "../actions.js";
import { span } from "../format.js";

const MOON = "M20.5 14.6A9 9 0 1 1 9.4 3.5a7.2 7.2 0 0 0 11.1 11.1z";

/** Create the top line. @param {Function} act runs a call @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createHeader(act) {
  const moon = svg("svg.moon", { viewBox: "0 0 24 24", "aria-hidden": true }, svg("path", { d: MOON }));
  const status = el("span.status", { role: "status", "data-field": "status" });
  const uptime = el("span", { "data-field": "uptime" });
  const facts = el("span.quiet", { "data-field": "facts" });
  const drain = el("button.bare", { type: "button", title: "Accept no new requests and finish the running ones" }, "Drain");
  confirmFirst(drain, "Drain? New requests are refused until a restart", () =>
    act(drain, { op: "drain" }, "The daemon accepts no new requests and finishes the running ones"),
  );
  const node = el(
    "header", {}, moon,
    el("div.title", {}, el("h1", {}, "Luna Daemon"), el("p", {}, status, uptime, facts)), drain,
  );

  function update({ link, info }) {
    const live = link === "live";
    const state = live ? info.status : link;
    text(status, state);
    attribute(node, "data-status", state);
    text(uptime, live ? `up ${span(info.uptime_s)}` : "");
    text(facts, live ? [info.version, info.backend, info.pid ? `process ${info.pid}` : ""].filter(Boolean).join(" · ") : "");
    drain.hidden = !live || info.status !== "running";
  }
  return { node, update };
}
