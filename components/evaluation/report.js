// Search and order of the samples. Without it the page has all of them, in groups.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const [tools, search, order, outcome, found] = ["tools", "search", "order", "outcome", "found"].map(at);
  const [groups, flat, more] = ["groups", "flat", "more"].map(at);
  const PAGE = 20;
  const cards = new Map();
  for (const card of groups.querySelectorAll(".card")) cards.set(card.dataset.row, card);
  const all = [...cards.values()].map((card) => ({ card, text: card.textContent.toLowerCase(), key: Math.random() }));
  let shown = PAGE;

  const passes = ({ card, text }) =>
    search.value.toLowerCase().split(/\s+/).every((word) => text.includes(word)) &&
    (!outcome.value || (outcome.value === "disagree" ? card.dataset.disagree === "1" : card.dataset.outcome === outcome.value));

  const sorted = (rows) => {
    if (order.value === "random") return rows.sort((a, b) => a.key - b.key);
    const [name, sign] = (order.value || "row:1").split(":");
    return rows.sort((a, b) => sign * (a.card.dataset[name] - b.card.dataset[name]) || a.card.dataset.row - b.card.dataset.row);
  };

  const show = () => {
    const isList = Boolean(search.value.trim() || order.value || outcome.value);
    groups.hidden = isList;
    flat.hidden = more.hidden = !isList;
    found.value = "";
    if (!isList) return flat.replaceChildren();
    const rows = sorted(all.filter(passes));
    flat.replaceChildren(...rows.slice(0, shown).map(({ card }) => card.cloneNode(true)));
    more.hidden = rows.length <= shown;
    found.value = rows.length === 1 ? "1 sample" : `${rows.length} samples`;
  };

  const restart = () => { shown = PAGE; show(); };
  tools.hidden = false;
  tools.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", restart);
  outcome.addEventListener("change", restart);
  order.addEventListener("change", () => { for (const row of all) row.key = Math.random(); restart(); });
  more.addEventListener("click", () => { shown += PAGE; show(); });
  addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details:not(#rest)")) fold.open = true; });
})();
