// Niceties only: without this script the page shows everything, in the same order.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Tabs, one per model.
  const models = all(".model");
  if (models.length > 1) {
    const list = document.createElement("div");
    list.className = "tabs";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", "Models");
    const tabs = models.map((model) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = model.id + "-tab";
      tab.textContent = model.querySelector("h2").textContent;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", model.id);
      model.setAttribute("role", "tabpanel");
      model.setAttribute("aria-labelledby", tab.id);
      list.append(tab);
      return tab;
    });
    const choose = (at) => tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === at));
      tab.tabIndex = i === at ? 0 : -1;
      models[i].hidden = i !== at;
    });
    const follow = () => {
      const target = document.getElementById(location.hash.slice(1));
      const at = models.findIndex((model) => target && model.contains(target));
      if (at >= 0) {
        choose(at);
        target.scrollIntoView();
      }
    };
    tabs.forEach((tab, i) => tab.addEventListener("click", () => choose(i)));
    list.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const at = tabs.indexOf(document.activeElement);
      const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0, End: last }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      choose(to);
      tabs[to].focus();
    });
    models[0].before(list);
    choose(0);
    follow();
    addEventListener("hashchange", follow);
  }

  // Tables that sort by a click on a column's head.
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent;
    const number = Number(text);
    return text.trim() === "" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  all("table.sortable").forEach((table) => {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(head.firstChild);
      head.prepend(button);
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("number") && column > 0;
        const before = head.getAttribute("aria-sort");
        const down = before ? before === "ascending" : numeric;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        // Rows without a value stay last in either direction.
        rows.sort(([a], [b]) =>
          a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b));
        body.append(...rows.map(([, row]) => row));
      });
    });
  });

  // What a point says: nearest to the pointer, or the next by arrow key.
  const tip = document.getElementById("tip");
  all(".scatter").forEach((svg) => {
    const marks = all(".mark", svg).map((node) => {
      const title = node.querySelector("title");
      const place = node.transform.baseVal[0].matrix;
      title.remove();
      return { node, text: title.textContent, x: place.e, y: place.f };
    });
    const byPlace = [...marks].sort((a, b) => a.x - b.x || a.y - b.y);
    let shown = null;
    const hide = () => {
      shown?.node.classList.remove("on");
      shown = null;
      tip.hidden = true;
    };
    const show = (mark) => {
      if (mark === shown) return;
      hide();
      shown = mark;
      mark.node.classList.add("on");
      tip.textContent = mark.text;
      tip.hidden = false;
      const box = mark.node.getBoundingClientRect();
      const left = Math.min(box.right + 8, innerWidth - tip.offsetWidth - 8);
      const top = box.top - tip.offsetHeight - 8;
      tip.style.left = Math.max(left, 8) + "px";
      tip.style.top = (top < 8 ? box.bottom + 8 : top) + "px";
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const unit = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * unit;
      const y = (event.clientY - box.top) * unit;
      let best = null;
      let least = 18 ** 2;
      for (const mark of marks) {
        const far = (mark.x - x) ** 2 + (mark.y - y) ** 2;
        if (far < least) [best, least] = [mark, far];
      }
      if (best) show(best);
      else hide();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.tabIndex = 0;
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const at = byPlace.indexOf(shown) + (shown || step > 0 ? step : 0);
      show(byPlace[(at + byPlace.length) % byPlace.length]);
    });
  });

  // Closed details would be missing on paper.
  addEventListener("beforeprint", () => all("details").forEach((node) => { node.open = true; }));
})();
