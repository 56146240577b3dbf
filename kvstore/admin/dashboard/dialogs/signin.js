// Asks for a token; it is kept for this tab only.

import { token } from "../api.js";
import { Form, useAction } from "../ui.js";
import { html, useId, useState } from "../vendor/preact.js";

export function SignIn({ problem, onToken }) {
  const [text, setText] = useState("");
  const id = useId();
  const action = useAction(async () => {
    token.set(text.trim());
    await onToken();
  });
  return html`<main class="signin">
    <h1><img src="dashboard/icon.svg" alt="" width="24" height="24" />kvstore</h1>
    <${Form} action=${action} label="Sign in" disabled=${!text.trim()}>
      <p class="problem" role="alert">${problem}</p>
      <label for=${id}>Token</label>
      <input id=${id} type="password" value=${text} onInput=${(event) => setText(event.target.value)} autocomplete="current-password" autofocus spellcheck=${false} />
      <p class="small dim">As <code>kvstore token create</code> printed it, or an access token of your identity provider. It is forgotten when this tab closes.</p>
    <//>
  </main>`;
}
