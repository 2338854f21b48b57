// What test_browser.py asks of an open page. Each check returns its faults, one string each.
"use strict";
window.checks = (() => {
  const seen = (e) => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })
    && e.getClientRects().length > 0;
  const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
  const named = (e) => `${e.tagName.toLowerCase()}${e.className ? "." + e.className : ""} `
    + `'${(e.getAttribute("aria-label") || e.textContent).trim().slice(0, 30)}'`;
  const still = () => document.getAnimations().forEach((a) => a.finish());

  const parse = (text) => {
    const match = text.match(/^rgba?\(([^)]*)\)$/);
    if (!match) throw new Error(`a colour that the check cannot read: ${text}`);
    const [r, g, b, a = 1] = match[1].split(/[ ,/]+/).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) =>
    [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const above = (e) => { // the element and what it stands in, inside out
    const line = [];
    for (let at = e; at; at = at.parentElement) line.push(getComputedStyle(at));
    return line;
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // WCAG 2.2, 1.4.3: (lighter + 0.05) / (darker + 0.05) of relative luminances
  const ratio = (e) => {
    const styles = above(e);
    const ground = styles.map((s) => parse(s.backgroundColor)).reverse()
      .reduce((below, colour) => over(colour, below), [255, 255, 255, 1]);
    const [r, g, b, a] = parse(styles[0].color);
    const ink = over([r, g, b, styles.reduce((o, s) => o * Number(s.opacity), a)], ground);
    const [dark, light] = [luminance(ink), luminance(ground)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };

  return {
    heading() {
      const found = all("h1");
      return found.length === 1 ? [] : [`${found.length} headings of the first level`];
    },

    images() {
      return [...document.images].filter((i) => !i.alt || !i.naturalWidth)
        .map((i) => `an image without ${i.alt ? "content" : "description"}: ${i.src}`);
    },

    formulas() {
      const plain = [...document.querySelectorAll(".math")]
        .filter((m) => !m.querySelector("mjx-container")).map(named);
      const wrong = [...document.querySelectorAll("[data-mjx-error], mjx-merror")].map(named);
      return [...plain, ...wrong].map((m) => `a formula that is not set: ${m}`);
    },

    // numbers and captions: above a table or figure
    captions() {
      const faults = [];
      for (const caption of all("caption, figcaption")) {
        const number = caption.querySelector(".caption-number");
        if (!number) continue;
        const owner = caption.closest("table, figure");
        // a formula in a caption is an image, too
        const inside = [...owner.querySelectorAll("tr, img, svg, pre")];
        const body = inside.find((e) => !caption.contains(e))?.getBoundingClientRect();
        const own = caption.getBoundingClientRect();
        if (!body) faults.push(`nothing under a caption: ${number.textContent}`);
        else if (own.bottom > body.top + 1) {
          faults.push(`a caption on the wrong side: ${number.textContent}`);
        }
      }
      return faults;
    },

    // after a key was pressed: browsers show the focus to those who use the keyboard
    focus() {
      const look = (e) => [e, e.closest("form")].filter(Boolean).map((at) => {
        const s = getComputedStyle(at);
        return [s.outlineStyle === "none" ? "" : s.outline, s.boxShadow, s.backgroundColor];
      }).join(" | ");
      document.activeElement?.blur();
      const faults = [];
      for (const e of all("a[href], button, input, summary, [tabindex='0']")) {
        still();
        const before = look(e);
        e.focus({ preventScroll: true });
        still();
        if (document.activeElement !== e) faults.push(`not reached by keyboard: ${named(e)}`);
        else if (look(e) === before) faults.push(`keyboard focus does not show: ${named(e)}`);
        e.blur();
      }
      return faults;
    },

    contrast(least) {
      const parts = new Set(document.querySelectorAll("mjx-container"));
      const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        const skipped = e.closest("script, style, noscript, svg, mjx-container");
        if (walk.currentNode.data.trim() && !skipped) parts.add(e);
      }
      const faults = new Map();
      for (const e of [...parts].filter(seen)) {
        const found = ratio(e);
        if (found >= least) continue;
        const kind = `${e.tagName}.${e.className} at ${found.toFixed(2)}`;
        faults.set(kind, [...(faults.get(kind) ?? []), named(e)]);
      }
      return [...faults.values()].map((few) => `pale: ${few[0]} (${few.length} such)`);
    },

    width() {
      const page = document.scrollingElement;
      if (page.scrollWidth <= window.innerWidth) return [];
      const wide = all("main *").filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1);
      return [`${page.scrollWidth} px wide at ${window.innerWidth}: ${wide.slice(0, 3).map(named)}`];
    },

    open() { // what is folded is text, too
      document.querySelectorAll("details").forEach((d) => { d.open = true; });
      still();
    },
  };
})();
