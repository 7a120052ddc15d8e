// Message while no daemon answers.

import { el, text } from "../dom.js";
import { clock } from "../format.js";

/** Create the message. @param {boolean} sayStart whether to say how a daemon is started @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createAbsence(sayStart) {
  const title = el("h2");
  const why = el("p", { "data-field": "why" });
  const start = el("p", {}, "Start it with ", el("code", {}, "luna-daemon serve"), ".");
  const last = el("p.quiet");
  const node = el(
    "section.absence", { "data-part": "absence", role: "status" }, title, why, start,
    el("p.quiet.pulse", {}, "Connecting again …"), last,
  );

  function update({ link, why: reason, info, seen }) {
    node.hidden = link === "live";
    if (node.hidden) return;
    text(title, link === "connecting" ? "Connecting to the daemon" : "The daemon is away");
    const local = "Pictures are still made: until the daemon is back, each ComfyUI computes with models of its own.";
    text(why, link === "away" ? [reason && `${reason[0].toUpperCase()}${reason.slice(1)}.`, local].filter(Boolean).join(" ") : "");
    start.hidden = link !== "away" || !sayStart;
    text(last, info ? `The values below are from ${clock(seen)}.` : "");
  }
  return { node, update };
}
