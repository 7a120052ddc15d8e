// What is shown while no daemon answers: calmly, and that the panel looks again by itself.

import { el, text } from "../dom.js";
import { clock } from "../format.js";

/** @param {boolean} sayStart @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createAbsence(sayStart) {
  const title = el("h2");
  const why = el("p", { "data-field": "why" });
  const start = el("p", {}, "Start it with ", el("code", {}, "luna-daemon serve"), ".");
  const last = el("p.quiet");
  const node = el(
    "section.absence", { "data-part": "absence", role: "status" }, title, why, start,
    el("p.quiet.pulse", {}, "Looking for it again …"), last,
  );

  function update({ link, why: reason, info, seen }) {
    node.hidden = link === "live";
    if (node.hidden) return;
    text(title, link === "connecting" ? "Looking for the daemon" : "The daemon is away");
    const local = "Pictures are still made: each ComfyUI uses its own models until it is back.";
    text(why, link === "away" ? [reason && `${reason[0].toUpperCase()}${reason.slice(1)}.`, local].filter(Boolean).join(" ") : "");
    start.hidden = link !== "away" || !sayStart;
    text(last, info ? `Below is what was known at ${clock(seen)}.` : "");
  }
  return { node, update };
}
