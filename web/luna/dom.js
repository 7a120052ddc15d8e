// Helpers for DOM elements. Contents are set as text only, never as markup: names of LoRAs may hold anything.

/**
 * Create an HTML element.
 * @param {string} tag `div`, or with classes: `div.card.wide`
 * @param {object} [props] attributes, and listeners under names such as `onclick`; null and false are left out
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return filled(document.createElement(name), props, classes, children);
}

/** Create an SVG element; parameters as for `el`. @returns {SVGElement} */
export function svg(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), props, classes, children);
}

function filled(node, props, classes, children) {
  if (classes.length) node.classList.add(...classes);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else attribute(node, name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Set an attribute, or remove the attribute for null and false; an equal value is left alone. */
export function attribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else {
    const wanted = value === true && !name.startsWith("aria-") ? "" : String(value);
    if (node.getAttribute(name) !== wanted) node.setAttribute(name, wanted);
  }
}

/** Set an element's text; an equal text is left alone, which keeps a selection in the text. */
export function text(node, value) {
  const wanted = String(value);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/**
 * Match a parent's children to a list, one child per key. Children are kept and moved, so that keyboard focus and
 * hover stay on the same item.
 * @param {HTMLElement} parent
 * @param {Array<object>} items
 * @param {(item: object) => string} keyOf
 * @param {(item: object) => HTMLElement} make
 * @param {(node: HTMLElement, item: object) => void} update
 */
export function keyed(parent, items, keyOf, make, update) {
  const focused = parent.getRootNode().activeElement;
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = old.get(key);
    if (node === undefined) {
      node = make(item);
      node.dataset.key = key;
    }
    old.delete(key);
    update(node, item);
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
  }
  for (const node of old.values()) node.remove();
  if (focused && parent.contains(focused)) focused.focus({ preventScroll: true });
}

/**
 * Create a section of the panel with a heading.
 * @param {string} name for `data-part` @param {string} title @param {...Node} children
 * @returns {HTMLElement}
 */
export function card(name, title, ...children) {
  const heading = el("h2", { id: `luna-${name}` }, title);
  return el("section.card", { "data-part": name, "aria-labelledby": `luna-${name}` }, heading, ...children);
}
