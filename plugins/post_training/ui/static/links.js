// Links that leave the page. Airflow's frame lets nothing open another window or replace Airflow's own page,
// so such a link is followed by the document around it, which is of the same origin.

import { h } from "./dom.js";

/** A link to another site, in a window of its own. */
export function outside(href, ...children) {
  return link(href, "_blank", children);
}

/** A link to one of Airflow's own pages, by its path below Airflow's address. */
export function airflow(path, ...children) {
  return link(new URL(`../../${path}`, location.href).href, "_self", children);
}

function link(href, target, children) {
  const safe = /^https?:/.test(new URL(href, location.href).protocol) ? href : null;
  const follow = (event) => {
    if (safe === null || window.parent === window || event.button !== 0) return;
    event.preventDefault();
    const twin = window.parent.document.createElement("a");
    Object.assign(twin, { href: safe, target, rel: "noopener" });
    window.parent.document.body.append(twin);
    twin.click();
    twin.remove();
  };
  return h("a", { href: safe, target, rel: "noopener", onclick: follow }, ...children);
}
