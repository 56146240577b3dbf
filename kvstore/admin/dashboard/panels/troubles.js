// What went wrong lately: bad blocks, tiers that do not answer, and why blocks were missed.

import { ago, count, short } from "../format.js";
import { breakerOf, series } from "../samples.js";
import { Badge, Empty, Panel, Tiers } from "../ui.js";
import { html } from "../vendor/preact.js";

const REASONS = {
  not_stored: "not stored any more",
  deadline: "too late",
  corrupt: "did not verify",
  unavailable: "tier did not answer",
  no_room: "no room in memory",
};

export function Troubles({ app }) {
  const { node, now } = app;
  const bad = node.bad_blocks ?? [];
  const silent = node.tiers.filter((tier) => breakerOf(node, tier.medium) !== "closed");
  const failed = series(node, "tier_operations").filter(([{ outcome }, value]) => value && ["unavailable", "error"].includes(outcome));
  const missed = series(node, "missed_blocks").filter(([, value]) => value).sort((one, other) => other[1] - one[1]);
  const calm = !bad.length && !silent.length && !failed.length;
  return html`<${Panel} title="Trouble" name="troubles" aside=${calm ? html`<${Badge} kind="good">none<//>` : ""}>
    ${silent.map((tier) => html`<p class="problem">The ${tier.medium} tier does not answer. Its breaker is open: lookups miss its blocks, and it is tried again by itself.</p>`)}
    <h3>Bad blocks</h3>
    ${bad.length
      ? html`<ul class="list compact">${bad.slice(0, 6).map((block) => html`<li key=${block.key + block.at}><div class="line">
          <button type="button" class="link mono" onClick=${() => app.openPrompt(block.key)}>${short(block.key)}</button><${Tiers} media=${block.tier ? [block.tier] : []} /><span class="dim small right">${ago(block.at, now)}</span>
        </div></li>`)}</ul>`
      : html`<${Empty}>Every block that was read verified.<//>`}
    <h3>Operations that failed</h3>
    ${failed.length
      ? html`<ul class="list compact">${failed.map(([{ tier, operation, outcome }, value]) => html`<li><div class="line"><${Tiers} media=${[tier]} /><span>${operation}: ${outcome}</span><b class="right">${count(value)}</b></div></li>`)}</ul>`
      : html`<${Empty}>No tier refused an operation.<//>`}
    ${missed.length > 0 && html`<h3>Not delivered</h3>
      <ul class="list compact">${missed.map(([{ reason }, value]) => html`<li><div class="line"><span>${REASONS[reason] ?? reason}</span><b class="right">${count(value)}</b></div></li>`)}</ul>`}
  <//>`;
}
