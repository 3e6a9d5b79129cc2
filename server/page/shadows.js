// Shadow engines: what each showed beside the engine that answers, and its promotion.

import { $, element, milliseconds } from "./common.js";

const FIGURES = {
  "compared": ({ images }) => images.toLocaleString("en"),
  "same label": ({ agreement }) => (agreement == null ? "–" : `${(agreement * 100).toFixed(1)} %`),
  "probability apart": ({ mean_difference: mean }) => (mean == null ? "–" : mean.toFixed(3)),
  "inference, p99": ({ inference_ms: own, inference_of_ms: of }) => `${milliseconds(own.p99)} / ${milliseconds(of.p99)}`,
  "dropped": ({ dropped }) => dropped.toLocaleString("en"),
};

/** What shows the shadows among the engines of `/stats`. */
export function setUpShadows({ ask, listEngines }) {
  const rows = new Map(); // by the candidate's name; kept, lest a button go while it is pressed

  async function act(row, method, path, done) {
    for (const button of row.buttons) button.disabled = true;
    try {
      await ask(path, { method });
      $("shadow-said").textContent = done;
      await listEngines();
    } catch (error) {
      $("shadow-said").textContent = error.message;
    }
    for (const button of row.buttons) button.disabled = false;
  }

  function makeRow(name) {
    const path = `engines/${encodeURIComponent(name)}`;
    const title = element("h3"), values = Object.keys(FIGURES).map(() => element("dd"));
    const promote = element("button", { type: "button", textContent: "Promote", ariaLabel: `Promote ${name}` });
    const end = element("button", { type: "button", className: "quiet", textContent: "End", ariaLabel: `End ${name}'s comparison` });
    const row = { title, values, buttons: [promote, end] };
    promote.addEventListener("click", () => act(row, "POST", `${path}/promote`, `${name} is the default engine.`));
    end.addEventListener("click", () => act(row, "DELETE", `${path}/shadow`, `${name} is compared no more.`));
    const labels = Object.keys(FIGURES);
    row.element = element(
      "li", {},
      element("div", { className: "head" }, title, element("span", { className: "actions" }, promote, end)),
      element("dl", { className: "figures" },
        ...labels.map((label, number) => element("div", {}, element("dt", { textContent: label }), values[number]))),
    );
    return row;
  }

  return (engines) => {
    const shadows = new Map(engines.filter(({ shadow }) => shadow).map(({ engine, shadow }) => [engine, shadow]));
    for (const [name, row] of rows) {
      if (shadows.has(name)) continue;
      row.element.remove();
      rows.delete(name);
    }
    for (const [name, shadow] of shadows) {
      if (!rows.has(name)) {
        rows.set(name, makeRow(name));
        $("shadow-list").append(rows.get(name).element);
      }
      const row = rows.get(name);
      row.title.textContent = `${name} beside ${shadow.of}, on ${(shadow.share * 100).toFixed(0)} % of its images`;
      Object.values(FIGURES).forEach((figure, number) => { row.values[number].textContent = figure(shadow); });
    }
    $("shadows").hidden = rows.size === 0 && !$("shadow-said").textContent;
  };
}
