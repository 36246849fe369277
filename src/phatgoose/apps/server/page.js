// The server's page: asks the API for answers with their routing and shows them as they come.
"use strict";

// app.py writes ROUTERS before this: what a request may name, "" for the model's own router.
const at = (id) => document.getElementById(id);

class Api {
  key = "";

  async ask(path, body, signal) {
    const headers = body ? {"Content-Type": "application/json"} : {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const options = {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)};
    const response = await fetch(path, options);
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const error = new Error(said?.error?.message ?? `The server answered ${response.status}.`);
    error.status = response.status;
    throw error;
  }

  // The chunks of a streamed answer.
  async *stream(path, body, signal) {
    const response = await this.ask(path, {...body, stream: true}, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        yield chunk;
      }
    }
  }
}

// One answer: its routing's settings above, its tokens below.
class Pane {
  constructor(root, order) {
    this.root = root;
    this.order = order;
    this.find = (name) => root.querySelector(`.${name}`);
    ROUTERS.forEach((name) => this.find("router").append(new Option(name || "as served", name)));
    this.explorer = null;
  }

  routing() { // the fields of a request
    const names = this.find("experts").value.split(",").map((name) => name.trim()).filter(Boolean);
    return {
      ...(this.find("router").value && {router: this.find("router").value}),
      ...(this.find("k").value && {k: Number(this.find("k").value)}),
      ...(names.length && {keep: names}),
    };
  }

  begin() {
    this.explorer = null;
    this.text = "";
    this.count = 0;
    this.routed = "";
    this.begun = performance.now();
    this.find("explorer").replaceChildren();
    this.find("plain").textContent = "";
    this.find("plain").hidden = true;
    this.find("who").hidden = true;
    this.say("waiting …");
  }

  say(text) {
    this.find("status").textContent = text;
  }

  take(choice) {
    const text = choice.text ?? choice.delta.content ?? "";
    this.text += text;
    if (choice.routing) this.route(choice.routing);
    if (!this.explorer) this.plain();
    const seconds = (performance.now() - this.begun) / 1000;
    this.say(`${this.count || "…"} tokens, ${seconds.toFixed(1)} s${this.routed ? `, ${this.routed}` : ""}`);
  }

  plain() {
    this.find("plain").hidden = this.text === "";
    this.find("plain").textContent = this.text;
  }

  route(routing) {
    this.routed = routing.router ? `router ${routing.router}` : "";
    this.count += routing.tokens.filter((token) => token.part === "answer").length;
    if (routing.trace && this.explorer) {
      for (const [i, stream] of routing.trace.streams.entries()) this.explorer.append({...stream, stream: i});
    } else if (routing.trace) {
      this.find("plain").hidden = true;
      const before = this.wanted;
      this.explorer = new TokenExplorer(this.find("explorer"), routing.trace, this.order);
      if (before) this.explorer.view(before);
    }
    this.share(Object.entries(routing.summary ?? {}));
  }

  share(entries) { // a bar of who answered, in the colours of the tokens
    const bar = this.find("who");
    bar.hidden = !entries.length;
    bar.replaceChildren(...entries.map(([name, share]) => {
      const part = document.createElement("span");
      part.className = this.order.includes(name) ? TokenExplorer.classes(name, this.order) : "tx-none";
      part.style.flex = `${share} 1 0`;
      part.textContent = part.title = `${name} ${Math.round(100 * share)} %`;
      return part;
    }));
  }

  view(wanted) { // as the other pane has it
    this.wanted = wanted;
    this.explorer?.view(wanted);
  }
}

class Page {
  constructor() {
    this.api = new Api();
    this.models = [];
    this.answers = 0; // finished since the page was opened
    this.order = []; // of the experts' colours
    this.panes = ["a", "b"].map((side) => new Pane(at(`pane-${side}`), this.order));
    this.panes.forEach((pane, i) => {
      pane.find("explorer").addEventListener("view", (event) => {
        this.panes.forEach((each, j) => (i === j ? (each.wanted = event.detail) : each.view(event.detail)));
      });
    });
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.answer();
    });
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
    });
    at("stop").addEventListener("click", () => this.running?.abort());
    at("compare").addEventListener("change", () => this.arrange());
    at("model").addEventListener("change", () => this.choose());
    at("right").addEventListener("change", () => this.correct());
    at("check").addEventListener("toggle", () => this.check());
    at("key").addEventListener("submit", (event) => {
      event.preventDefault();
      this.unlock();
    });
    this.open();
  }

  async open() {
    try {
      this.models = (await (await this.api.ask("v1/models")).json()).data;
    } catch (error) {
      at("key").hidden = error.status !== 401;
      if (error.status !== 401 || this.api.key) this.complain(error.message);
      return;
    }
    at("key").hidden = true;
    this.complain("");
    this.order.push(...new Set(this.models.flatMap((model) => model.experts)));
    at("model").replaceChildren(...this.models.map((model) => new Option(model.id, model.id)));
    this.choose();
  }

  unlock() {
    this.api.key = at("secret").value;
    this.open();
  }

  get model() {
    return this.models.find((model) => model.id === at("model").value);
  }

  choose() {
    const {chat, experts, prompts, router, traces} = this.model;
    at("as").value = chat ? "chat" : "text";
    at("as").closest("label").hidden = !chat;
    at("names").replaceChildren(...experts.map((name) => new Option(name, name)));
    at("right").replaceChildren(new Option("choose", ""), ...experts.map((name) => new Option(name, name)));
    at("correction").hidden = true;
    at("check").hidden = !prompts.length || !router?.startsWith("discriminant");
    at("check").open = false;
    at("examples").hidden = !prompts.length;
    at("examples").replaceChildren("Try", ...prompts.map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = button.title = text;
      button.addEventListener("click", () => {
        at("prompt").value = text;
        at("prompt").focus();
      });
      return button;
    }));
    const fixed = !traces && !router; // a base or one expert alone: there is nothing to route
    for (const pane of this.panes) pane.find("fields").hidden = fixed;
    at("compare").closest("label").hidden = fixed;
    if (fixed) at("compare").checked = false;
    this.arrange();
  }

  arrange() {
    const two = at("compare").checked;
    at("pane-b").hidden = !two;
    at("panes").classList.toggle("two", two);
  }

  async check() { // once its section is open
    if (!at("check").open) return;
    for (const id of ["warnings", "matrix", "moved"]) at(id).replaceChildren();
    at("verdict").textContent = "each is left out, and chosen for …";
    const model = this.model.id;
    let verdict;
    try {
      const checked = await (await this.api.ask(`v1/route/check?model=${encodeURIComponent(model)}`)).json();
      if (this.model.id !== model) return;
      verdict = `${checked.summary}.`;
      this.draw(checked);
    } catch (error) {
      verdict = error.message;
    }
    at("verdict").textContent = verdict;
  }

  draw({experts, prompts, findings, notes}) { // a row for each expert that loses prompts, a column for each that takes some
    const made = (name, ...children) => {
      const element = document.createElement(name);
      element.append(...children);
      return element;
    };
    at("warnings").replaceChildren(
      ...findings.map(({kind, message}) => made("li", made("strong", kind), `: ${message}`)),
      ...notes.map((note) => made("li", note)),
    );
    const lost = prompts.filter(({owner, winner}) => owner !== winner);
    const takers = [...new Set([...experts, "base"])].filter((name) => lost.some(({winner}) => winner === name));
    const rows = experts.filter((name) => lost.some(({owner}) => owner === name)).map((name) => {
      const count = prompts.filter(({owner}) => owner === name).length;
      const cells = takers.map((taker) => {
        const taken = lost.filter(({owner, winner}) => owner === name && winner === taker);
        if (!taken.length) return made("td");
        const button = made("button", String(taken.length));
        button.title = `${taken.length} of ${name}'s go to ${taker}`;
        button.style.setProperty("--share", taken.length / count);
        button.addEventListener("click", () => {
          const list = made("ul", ...taken.map(({prompt}) => made("li", prompt)));
          at("moved").replaceChildren(made("p", `${button.title}:`), list);
        });
        return made("td", button);
      });
      const kept = count - lost.filter(({owner}) => owner === name).length;
      const header = made("th", name);
      header.scope = "row";
      return made("tr", header, made("td", `${kept} of ${count}`), ...cells);
    });
    if (!rows.length) return;
    const head = ["expert", "kept", ...takers].map((name) => {
      const header = made("th", name);
      header.scope = "col";
      return header;
    });
    const caption = made("caption", "Who takes them: press a number for its prompts.");
    at("matrix").replaceChildren(caption, made("thead", made("tr", ...head)), made("tbody", ...rows));
  }

  complain(message) {
    at("problem").hidden = !message;
    at("problem").textContent = message;
  }

  request() {
    const chat = at("as").value === "chat";
    const prompt = at("prompt").value;
    return {
      path: chat ? "v1/chat/completions" : "v1/completions",
      body: {
        model: at("model").value,
        ...(chat ? {messages: [{role: "user", content: prompt}]} : {prompt}),
        max_tokens: Number(at("length").value),
        temperature: Number(at("temperature").value),
        seed: Number(at("seed").value),
        ...(this.model.experts.length && {routing: this.model.traces ? "trace" : true}),
      },
    };
  }

  async answer() {
    if (!this.model) return;
    this.running?.abort();
    const mine = (this.running = new AbortController());
    const {path, body} = this.request();
    this.complain("");
    this.busy(true);
    const panes = this.panes.filter((pane) => !pane.root.hidden);
    await Promise.all(panes.map((pane) => this.fill(pane, path, body, mine.signal)));
    if (this.running !== mine) return;
    this.busy(false);
    at("kept").textContent = "";
    at("right").value = "";
    at("correction").hidden = !this.model.router; // nothing was chosen
    at("panes").dataset.answers = ++this.answers;
  }

  // The named expert answers in the first pane, and the choice is corrected where the server learns.
  async correct() {
    const expert = at("right").value;
    if (!expert) return;
    const {path, body} = this.request();
    const model = body.model;
    const named = model === "auto" ? expert : `${model}:${expert}`;
    const prompt = at("prompt").value;
    this.busy(true);
    this.running = new AbortController();
    const [pane] = this.panes;
    await this.fill(pane, path, {...body, model: named}, this.running.signal, {});
    this.busy(false);
    if (!this.model.learns) return;
    try {
      await this.api.ask("v1/route/corrections", {model, expert, prompt});
      at("kept").textContent = `kept: ${expert} is for this`;
    } catch (error) {
      this.complain(error.message);
    }
  }

  async fill(pane, path, body, signal, routing = pane.routing()) {
    pane.begin();
    let end = "stopped";
    try {
      for await (const chunk of this.api.stream(path, {...body, ...routing}, signal)) {
        if (signal.aborted) return;
        for (const choice of chunk.choices) {
          pane.take(choice);
          if (choice.finish_reason) end = choice.finish_reason === "stop" ? "ended by itself" : "as long as asked for";
        }
      }
    } catch (error) {
      if (signal.aborted) {
        pane.say(`${pane.find("status").textContent}, stopped`);
        return;
      }
      end = "failed";
      this.complain(error.message);
    }
    pane.say(`${pane.find("status").textContent}, ${end}`);
  }

  busy(is) {
    at("stop").hidden = !is;
    at("panes").setAttribute("aria-busy", String(is));
  }
}

window.page = new Page();
