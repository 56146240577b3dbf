// The page: who is there, what is live, which dialog is open.

import { Refused, get, token } from "./api.js";
import { ago, seconds } from "./format.js";
import { moveFocus, useShortcuts } from "./keys.js";
import { useLive } from "./live.js";
import { ExplainDialog } from "./dialogs/explain.js";
import { HelpDialog } from "./dialogs/help.js";
import { JobDialog } from "./dialogs/job.js";
import { PromptDialog } from "./dialogs/prompt.js";
import { PurgeDialog } from "./dialogs/purge.js";
import { SignIn } from "./dialogs/signin.js";
import { Breakers } from "./panels/breakers.js";
import { Chart } from "./panels/chart.js";
import { Hot } from "./panels/hot.js";
import { Jobs } from "./panels/jobs.js";
import { Models } from "./panels/models.js";
import { Pins } from "./panels/pins.js";
import { Nodes, Regions } from "./panels/region.js";
import { Store } from "./panels/store.js";
import { Tiles } from "./panels/tiles.js";
import { Troubles } from "./panels/troubles.js";
import { html, render, useEffect, useState } from "./vendor/preact.js";

const ROLES = ["viewer", "operator", "admin"];

function App() {
  const [me, setMe] = useState(null);
  const [denied, setDenied] = useState("");
  const [dialog, open] = useState(null);
  const [said, setSaid] = useState("");
  const live = useLive(me !== null, (error) => signOut(error.message));

  const signOut = (reason = "") => {
    token.forget();
    setMe(null);
    setDenied(reason || "Signed out");
  };
  const signIn = async () => {
    try {
      const who = await get("v1/whoami");
      if (who.tenant) return signOut(`This token is of tenant ${who.tenant}, and this page is about the whole node. Use the commands or the API with it`);
      setMe(who);
      setDenied("");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      setDenied(error.status === 401 && !token.get() ? "A token is needed" : error.message);
      if (error.status === 401) token.forget();
    }
  };
  useEffect(() => void signIn(), []);
  useEffect(() => {
    if (!said) return undefined;
    const timer = setTimeout(() => setSaid(""), 6000);
    return () => clearTimeout(timer);
  }, [said]);
  const close = () => open(null);
  useShortcuts(
    me && !dialog
      ? {
          "?": () => open({ is: HelpDialog }),
          e: () => open({ is: ExplainDialog }),
          w: () => open({ is: JobDialog }),
          j: () => moveFocus("[data-row]", 1),
          k: () => moveFocus("[data-row]", -1),
          t: () => setSaid(`Theme: ${window.theme.next()}`),
        }
      : {},
  );

  if (!me) return denied ? html`<${SignIn} problem=${denied} onToken=${signIn} />` : null;
  const now = live.snapshot?.time ?? Date.now() / 1000;
  const app = {
    ...live,
    me,
    now,
    parts: live.snapshot?.parts ?? {},
    can: (role) => ROLES.indexOf(me.role) >= ROLES.indexOf(role),
    say: setSaid,
    openPrompt: (key) => open({ is: PromptDialog, prompt: { key } }),
    openExplain: () => open({ is: ExplainDialog }),
    explained: (prompt) => open({ is: PromptDialog, prompt }),
    openJob: () => open({ is: JobDialog }),
    openPurge: (space) => open({ is: PurgeDialog, space }),
    modelOf: (digest) => live.node?.namespaces.find((space) => space.digest === digest)?.fields.model,
  };
  const { is, ...rest } = dialog ?? {};
  return html`
    <${Header} app=${app} onHelp=${() => open({ is: HelpDialog })} onSignOut=${me.token && (() => signOut())} />
    <${Banner} app=${app} />
    <main aria-busy=${!live.snapshot}>${live.snapshot ? html`<${Panels} app=${app} />` : html`<p class="empty">Waiting for the first look…</p>`}</main>
    <footer><span>kvstore ${me.version}</span><span>Signed in as ${me.name}, ${me.role}</span><span>Press <kbd>?</kbd> for shortcuts</span></footer>
    ${is && html`<${is} key=${JSON.stringify(rest.prompt)} app=${app} onClose=${close} ...${rest} />`}
    <div class="toast" role="status" aria-live="polite">${said && html`<span>${said}</span>`}</div>
  `;
}

function Header({ app, onHelp, onSignOut }) {
  const [theme, setTheme] = useState(window.theme.current());
  const { me, node, now, broken } = app;
  const problem = app.snapshot?.problems.node;
  const [kind, text] = broken ? ["bad", "No connection"] : problem ? ["bad", "Node is down"] : !app.snapshot ? ["", "Connecting"] : node?.draining ? ["warn", "Draining"] : ["good", "Live"];
  const place = [me.region && `region ${me.region}`, node && `up ${seconds(node.uptime_seconds)}`].filter(Boolean).join(" · ");
  return html`<header class="top">
    <h1><img src="dashboard/icon.svg" alt="" width="20" height="20" />${me.site}</h1>
    <span class="dim place">${place}</span>
    <span class=${`pulse ${kind}`} role="status"><i></i>${text}</span>
    <nav aria-label="Actions">
      <button type="button" onClick=${app.openExplain} aria-keyshortcuts="e">Explain <kbd>e</kbd></button>
      <button type="button" onClick=${app.openJob} aria-keyshortcuts="w" disabled=${!app.can("operator")}>Start a job <kbd>w</kbd></button>
      <button type="button" class="quiet" onClick=${() => setTheme(window.theme.next())} aria-label=${`Theme: ${window.theme.current()}`} title=${`Theme: ${window.theme.current()}`} data-theme-now=${theme}>◐</button>
      <button type="button" class="quiet" onClick=${onHelp} aria-label="Shortcuts" title="Shortcuts">?</button>
      ${onSignOut && html`<button type="button" class="quiet" onClick=${onSignOut}>Sign out</button>`}
    </nav>
  </header>`;
}

/** What an operator must not overlook. */
function Banner({ app }) {
  const { snapshot, broken, nodeTime, now } = app;
  const problems = Object.entries(snapshot?.problems ?? {});
  const lines = broken
    ? [`${broken}. Trying again; what you see is from ${snapshot ? ago(snapshot.time, Date.now() / 1000) : "before"}.`]
    : problems.map(([part, problem]) =>
        part === "node" ? `The node does not answer: ${problem}.${nodeTime ? ` What you see of it is from ${ago(nodeTime, now)}.` : ""}` : null,
      ).filter(Boolean);
  const others = problems.filter(([part, problem]) => part !== "node" && problem !== snapshot.problems.node);
  for (const [part, problem] of broken ? [] : others) lines.push(`${part}: ${problem}`);
  return html`<div role="alert" class="banners">${lines.map((line) => html`<p class="banner">${line}</p>`)}</div>`;
}

function Panels({ app }) {
  const stale = app.broken || app.snapshot.problems.node;
  const node = app.node !== null;
  const linked = "replication" in app.parts || "replication" in app.snapshot.problems;
  return html`
    ${node && html`<div class=${stale ? "stale" : ""}><${Tiles} app=${app} /></div>`}
    <div class="grid">
      ${node && html`<${Chart} app=${app} /><${Store} app=${app} />`}
      ${linked && html`<${Regions} app=${app} />`}
      ${node && !linked && html`<${Hot} app=${app} />`}
      <${Jobs} app=${app} />
      ${node && linked && html`<${Hot} app=${app} />`}
      ${node && html`<${Troubles} app=${app} /><${Breakers} app=${app} />`}
      <${Nodes} app=${app} />
      ${node && html`<${Models} app=${app} wide=${linked} /><${Pins} app=${app} />`}
    </div>
  `;
}

render(html`<${App} />`, document.getElementById("app"));
