// Where prompts that share text part early, and what sharing it would be worth.

import { get } from "../api.js";
import { count, percent } from "../format.js";
import { Empty, Panel, Table } from "../ui.js";
import { html, useEffect, useState } from "../vendor/preact.js";

const EVERY_SECONDS = 60;
const SHOWN = 5;

export function Breakers({ app }) {
  const [report, setReport] = useState(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    const look = () => get("v1/breakers").then((found) => (setReport(found), setProblem("")), (error) => setProblem(error.message));
    look();
    const timer = setInterval(look, EVERY_SECONDS * 1000);
    return () => clearInterval(timer);
  }, []);
  const aside = report?.prompts ? html`<span class="dim small">${count(report.prompts)} prompts: ${percent(report.by_prefix / report.tokens)} shared as they are, ${percent(report.anywhere / report.tokens)} seen before</span>` : "";
  const rows = (report?.breakers ?? []).slice(0, SHOWN).map((one, at) => {
    const example = one.examples[0];
    return {
      key: at,
      cells: [
        count(one.token),
        count(one.prompts),
        html`${count(one.shareable)} <span class="dim">${percent(one.shareable / one.tokens)}</span>`,
        `${count(one.breaking)} tokens`,
        example && html`<span class="small"><${Request} app=${app} name=${example.later} /> and <${Request} app=${app} name=${example.earlier} /></span>`,
      ],
    };
  });
  return html`<${Panel} title="Where prompts part" name="breakers" wide aside=${aside}>
    ${problem ? html`<${Empty}>${problem}<//>` : report && !report.prompts
      ? html`<${Empty}>No prompt's content is known. Switch <code>content_fingerprints</code> on in the connector to see which text keeps prompts from sharing.<//>`
      : html`<${Table} caption="Places where prompts part" columns=${["At token", ">Prompts", ">Shareable tokens", ">To move", "For example"]} rows=${rows} empty="No prompts share text behind the place where they part." busy=${!report} />`}
  <//>`;
}

const Request = ({ app, name }) => html`<button type="button" class="link mono" onClick=${() => app.explained({ request: name })}>${name}</button>`;
