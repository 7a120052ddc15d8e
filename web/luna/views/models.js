// Models: what is loaded, and buttons to warm or unload one, or to unload all.

import { attribute, card, el, keyed, text } from "../dom.js";
import { confirmFirst } from "../actions.js";
import { KINDS, modelName } from "../format.js";

/** Create the list and the buttons. @param {Function} act runs a call @returns {{node: HTMLElement, update: (state: object) => void}} */
export function createModels(act) {
  const name = el("select", { "aria-label": "Model", "data-field": "model" });
  const kinds = Object.entries(KINDS).map(([value, label]) => el("option", { value }, label));
  const kind = el("select", { "aria-label": "Part", "data-field": "kind" }, ...kinds);
  const chosen = () => ({ kind: kind.value, name: name.value });
  const spoken = () => `${name.value} (${KINDS[kind.value]})`;
  const button = (label, title, onclick) => el("button", { type: "button", title, onclick }, label);
  const warm = button("Warm", "Load this model now, so that the first request need not wait", () =>
    act(warm, { op: "models.load", model: chosen() }, `${spoken()} is loaded`),
  );
  const unload = button("Unload", "Free this model's memory; the next request loads the model again", () =>
    act(unload, { op: "models.unload", model: chosen() }, `${spoken()} is unloaded`),
  );
  const all = el("button", { type: "button" }, "Unload all");
  confirmFirst(all, "Unload for everybody?", () =>
    act(all, { op: "models.unload" }, "All models are unloaded"),
  );
  const form = el("div.controls", {}, name, kind, warm, unload);
  const loaded = el("ul.loaded");
  const none = el("p.empty");
  const node = card("models", "Models", none, loaded, form, el("div.controls", {}, all));

  function update({ info }) {
    const models = info.models ?? {};
    const named = models.named ?? [];
    const keys = models.loaded ?? [];
    keyed(name, named, (value) => value, (value) => el("option", { value }, value), () => {});
    form.hidden = named.length === 0;
    none.hidden = keys.length > 0;
    text(none, named.length ? "Nothing is loaded. The first request for a model loads it." : "Nothing is loaded.");
    all.hidden = keys.length === 0;
    keyed(loaded, keys, (key) => key, makeLoaded, (item, key) => {
      const pinned = (models.pinned ?? []).includes(key);
      attribute(item, "data-pinned", pinned);
      text(item.lastChild, pinned ? "pinned" : "");
    });
  }
  return { node, update };
}

function makeLoaded(key) {
  const { kind, name } = modelName(key);
  return el("li", { title: key }, el("b", {}, name), ` ${kind} `, el("span.chip"));
}
