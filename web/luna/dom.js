// Elements. What they show is set as text only, never as markup: names of LoRAs come from anywhere.

/**
 * @param {string} tag `div`, or with classes: `div.card.wide`
 * @param {object} [props] attributes; functions named `onclick` and so on are listeners; null and false are left out
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return filled(document.createElement(name), props, classes, children);
}

/** The same for SVG. @returns {SVGElement} */
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

/** Set an attribute, or remove it for null and false; nothing happens if it is so already. */
export function attribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else {
    const wanted = value === true && !name.startsWith("aria-") ? "" : String(value);
    if (node.getAttribute(name) !== wanted) node.setAttribute(name, wanted);
  }
}

/** Set the text; a text that stays is left alone, and so is a selection in it. */
export function text(node, value) {
  const wanted = String(value);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/**
 * Bring a parent's children in line with a list, one child for each key; children are kept and moved, so that the
 * keyboard's focus and hover stay where they are.
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
  for (const gone of old.values()) gone.remove();
  if (focused && parent.contains(focused)) focused.focus({ preventScroll: true });
}

/**
 * A part of the panel with its heading.
 * @param {string} name for `data-part` @param {string} title @param {...Node} children
 * @returns {HTMLElement}
 */
export function card(name, title, ...children) {
  const heading = el("h2", { id: `luna-${name}` }, title);
  return el("section.card", { "data-part": name, "aria-labelledby": `luna-${name}` }, heading, ...children);
}
