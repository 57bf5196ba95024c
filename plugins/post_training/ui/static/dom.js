// Elements are made here alone. Text goes in as text: ids, models and logs are other people's words.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element. Keys that start with "on" are listeners; null and false leave an attribute out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Return an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return the element of an id, which the document must have. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the document has no element ${id}`);
  return found;
}

/** Let an element hold these nodes alone, in this order. Those that stay keep focus, selection and scroll. */
export function arrange(element, nodes) {
  for (const child of [...element.childNodes]) if (!nodes.includes(child)) child.remove();
  nodes.forEach((node, index) => {
    const there = element.childNodes[index] ?? null;
    if (there !== node) element.insertBefore(node, there);
  });
}

/** Makes a node of each item, and gives it again as long as the item says the same. */
export class Kept {
  constructor(make) {
    this.make = make;
    this.nodes = new Map();
  }

  of(items) {
    const keyed = items.map((item) => [JSON.stringify(item), item]);
    this.nodes = new Map(keyed.map(([key, item]) => [key, this.nodes.get(key) ?? this.make(item)]));
    return [...this.nodes.values()];
  }
}

/** Put nodes into an element unless it shows the same already: focus and selection stay. */
export function show(element, key, make) {
  const text = JSON.stringify(key);
  if (element.dataset.shown === text) return;
  element.dataset.shown = text;
  element.replaceChildren(...[make()].flat().filter((child) => child !== null));
}
