// Long work: progress, cancel, go on.

import { post } from "../api.js";
import { ago, bytes, count, percent, seconds } from "../format.js";
import { Badge, Empty, Panel } from "../ui.js";
import { html } from "../vendor/preact.js";

const KINDS = { done: "good", failed: "bad", interrupted: "warn", cancelled: "" };

export function Jobs({ app }) {
  const jobs = app.parts.jobs ?? [];
  return html`<${Panel} title="Jobs" name="jobs" aside=${html`<button type="button" class="small" onClick=${app.openJob} disabled=${!app.can("operator")}>Start…</button>`}>
    ${jobs.length ? html`<ul class="list">${jobs.slice(0, 8).map((job) => html`<${Job} key=${job.id} job=${job} app=${app} />`)}</ul>` : html`<${Empty}>No job was run yet.<//>`}
  <//>`;
}

function Job({ job, app }) {
  const { done, total, unit, note } = job.progress;
  const amount = unit === "bytes" ? bytes : count;
  const steer = async (verb, said) => {
    try {
      await post(`v1/jobs/${job.id}/${verb}`);
      app.say(`${job.kind} ${said}`);
    } catch (error) {
      app.say(error.message);
    }
  };
  const running = job.state === "running";
  return html`<li data-job=${job.id}>
    <div class="line">
      <b>${job.kind}</b>
      ${running ? html`<span class="dim">${note}</span>` : html`<${Badge} kind=${KINDS[job.state]}>${job.state}<//>`}
      <span class="right">
        ${running && html`<button type="button" class="small" disabled=${!app.can("operator")} onClick=${() => steer("cancel", "is cancelled")} aria-label=${`Cancel ${job.kind}`}>Cancel</button>`}
        ${["failed", "cancelled", "interrupted"].includes(job.state) && html`<button type="button" class="small" disabled=${!app.can("operator")} onClick=${() => steer("resume", "goes on")} aria-label=${`Resume ${job.kind}`}>Resume</button>`}
      </span>
    </div>
    ${running && html`<progress max=${total ?? undefined} value=${total ? done : undefined} aria-label=${`${job.kind} progress`}></progress>`}
    <div class="line small dim">
      <span>${total ? `${amount(done)} of ${amount(total)} ${unit === "bytes" ? "" : unit} · ${percent(done / total)}` : done ? `${amount(done)} ${unit === "bytes" ? "" : unit}` : ""}</span>
      <span class="right">${running ? `for ${seconds(app.now - (job.started ?? job.created))}` : ago(job.finished ?? job.created, app.now)}</span>
    </div>
    ${job.problem && html`<p class="small problem">${job.problem}</p>`}
  </li>`;
}
