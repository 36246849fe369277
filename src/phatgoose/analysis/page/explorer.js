// The token explorer: a text, each token in the colour of the expert that served it most.
//
//   const explorer = new TokenExplorer(element, trace);   // trace: docs/analysis.md, "Traces"
//   explorer.append({stream: 0, tokens, parts, experts, weights});   // more tokens, as they come
//
// An expert's colour is that of its place in the third argument, an array of names that is the trace's
// if it isn't given. An explorer tells its element of another layer or kind with the event "view";
// view() reads and sets both. Where neither makes a difference, there is nothing to choose.
//
// Nothing but the DOM is needed. Only tokens whose look changes are touched, and all events are
// handled by their container, so that texts of many hundreds of tokens stay quick.
"use strict";

class TokenExplorer {
  static COLOURS = 7; // see explorer.css; each comes again underlined in two other ways
  static PATTERNS = 3;
  static SPECIAL = /^\s*(<\|.+\|>|<\/?(s|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[(CLS|SEP|PAD|BOS|EOS)\])\s*$/;
  static LISTED = 8; // experts named for a token; the others are summed
  static LEGEND = 24; // experts in the legend at once
  static count = 0;

  constructor(root, trace, order = trace.experts) {
    this.root = root;
    this.experts = trace.experts;
    this.partNames = trace.parts;
    this.whole = trace.whole ?? []; // [expert, weight] of those chosen for the whole text
    this.streams = trace.streams.map((stream) => ({
      ...stream,
      tokens: [...stream.tokens],
      parts: [...stream.parts],
      experts: TokenExplorer.words(stream.experts),
      weights: TokenExplorer.bytes(stream.weights),
    }));
    this.id = `tx${TokenExplorer.count++}`;
    this.order = order;
    this.build();
    this.showStream(0);
  }

  static bytes(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  }

  static words(text) { // unsigned, 16 bits, the low byte first
    const bytes = TokenExplorer.bytes(text);
    return Uint16Array.from({length: bytes.length / 2}, (_, i) => bytes[2 * i] | (bytes[2 * i + 1] << 8));
  }

  static element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  look(expert) { // the classes of a token or a swatch
    return expert < 0 ? "tx-none" : TokenExplorer.classes(this.experts[expert], this.order);
  }

  static classes(name, order) { // a name that `order` lacks comes to its end
    const {COLOURS, PATTERNS} = TokenExplorer;
    if (!order.includes(name)) order.push(name);
    const place = order.indexOf(name);
    return `tx-c${place % COLOURS} tx-p${Math.floor(place / COLOURS) % PATTERNS}`;
  }

  // Whether all sites serve every token alike, as they do by a router that chooses for prompts.
  static isFlat({sites, kept, experts, weights}) {
    return weights.every((weight, i) => {
      const first = i - (i % (sites.length * kept)) + (i % kept); // the same at the first site
      return weight === weights[first] && (weight === 0 || experts[i] === experts[first]);
    });
  }

  build() {
    const make = TokenExplorer.element;
    this.streamChoice = make("select", {id: `${this.id}-stream`});
    this.streams.forEach((stream, i) => this.streamChoice.append(new Option(`${stream.name}'s`, i)));
    const streamLabel = make("label", {for: `${this.id}-stream`}, "Tokens ", this.streamChoice);
    streamLabel.hidden = this.streams.length < 2;
    this.layerChoice = make("input", {id: `${this.id}-layer`, type: "range", min: 0, value: 0});
    this.layerShown = make("output", {for: `${this.id}-layer`});
    this.kindChoice = make("select", {id: `${this.id}-kind`});
    this.viewChoices = [
      make("label", {for: `${this.id}-layer`, class: "tx-layer"}, "Layer ", this.layerChoice, this.layerShown),
      make("label", {for: `${this.id}-kind`}, "Kind of site ", this.kindChoice),
    ];
    this.controls = make("div", {class: "tx-controls"}, streamLabel, ...this.viewChoices);
    this.text = make("div", {
      class: "tx-text",
      role: "listbox",
      tabindex: 0,
      "aria-label": "Tokens; arrow keys move from one to the next",
    });
    this.details = make("div", {class: "tx-details", role: "region", "aria-label": "Experts of the token"});
    this.legend = make("div", {class: "tx-legend", role: "group", "aria-label": "Experts; press one to see its tokens alone"});
    const chosen = this.whole.map(([expert, weight]) => `${expert} ${weight.toFixed(2)}`).join(", ");
    this.chosen = make("p", {class: "tx-count"}, `For the whole text: ${chosen}`);
    this.chosen.hidden = !this.whole.length;
    this.root.classList.add("tx");
    this.root.style.setProperty("--tx-experts", this.experts.length);
    this.root.replaceChildren(this.controls, this.chosen, make("div", {class: "tx-body"}, this.text, this.details, this.legend));
    this.streamChoice.addEventListener("change", () => this.showStream(Number(this.streamChoice.value)));
    this.layerChoice.addEventListener("input", () => this.chooseView());
    this.kindChoice.addEventListener("change", () => this.chooseView());
    this.text.addEventListener("pointerover", (event) => this.point(event));
    this.text.addEventListener("click", (event) => this.point(event));
    this.text.addEventListener("keydown", (event) => this.press(event));
    this.text.addEventListener("focus", () => this.activate(this.active));
    this.legend.addEventListener("click", (event) => this.pick(event));
  }

  showStream(index) {
    this.stream = this.streams[index];
    this.active = 0;
    this.only = null;
    this.spans = [];
    this.text.replaceChildren();
    this.layerChoice.max = this.stream.layers.length;
    this.layerChoice.value = 0;
    this.kindChoice.replaceChildren(new Option("all", ""));
    this.stream.kinds.forEach((kind, i) => this.kindChoice.append(new Option(kind, i)));
    this.addTokens(0);
    this.showView();
  }

  addTokens(from) {
    const fresh = document.createDocumentFragment();
    for (let t = from; t < this.stream.tokens.length; t++) {
      const span = TokenExplorer.element("span", {
        class: "tx-token",
        role: "option",
        id: `${this.id}-t${t}`,
        "aria-selected": "false",
      });
      span.textContent = this.stream.tokens[t].replaceAll("\n", "⏎\n") || "·";
      if (this.stream.parts[t] === 1) span.dataset.part = "answer";
      if (TokenExplorer.SPECIAL.test(this.stream.tokens[t])) span.dataset.special = "";
      this.spans.push(span);
      fresh.append(span);
    }
    this.text.append(fresh);
  }

  append(more) {
    const stream = this.streams[more.stream ?? 0];
    const from = stream.tokens.length;
    const joined = (old, added) => {
      const all = new old.constructor(old.length + added.length);
      all.set(old);
      all.set(added, old.length);
      return all;
    };
    stream.tokens.push(...more.tokens);
    stream.parts.push(...more.parts);
    stream.experts = joined(stream.experts, TokenExplorer.words(more.experts));
    stream.weights = joined(stream.weights, TokenExplorer.bytes(more.weights));
    if (stream === this.stream) {
      this.addTokens(from);
      this.showView();
    }
  }

  chooseView() {
    this.showView();
    this.root.dispatchEvent(new CustomEvent("view", {detail: this.view()}));
  }

  view(wanted) { // {layer, kind}, as in the controls; what is wanted is taken over, if it is there
    if (wanted) {
      this.layerChoice.value = wanted.layer;
      this.kindChoice.value = wanted.kind;
      this.showView();
    }
    return {layer: this.layerChoice.value, kind: this.kindChoice.value};
  }

  // The weights of all experts for every token, summed over the sites in view, in 255ths.
  sums(sites) {
    const {stream} = this;
    const size = this.experts.length;
    const sums = new Uint32Array(stream.tokens.length * size);
    for (let t = 0; t < stream.tokens.length; t++) {
      for (const site of sites) {
        const begin = (t * stream.sites.length + site) * stream.kept;
        for (let i = begin; i < begin + stream.kept; i++) {
          sums[t * size + stream.experts[i]] += stream.weights[i];
        }
      }
    }
    return sums;
  }

  showView() {
    const flat = TokenExplorer.isFlat(this.stream);
    this.viewChoices.forEach((label) => (label.hidden = flat));
    const layer = Number(this.layerChoice.value) - 1;
    const kind = this.kindChoice.value === "" ? -1 : Number(this.kindChoice.value);
    const name = layer < 0 ? "all" : this.stream.layers[layer];
    this.layerShown.textContent = name;
    this.layerChoice.setAttribute("aria-valuetext", name);
    const sites = [...this.stream.sites.keys()].filter((s) => {
      const [at, of] = this.stream.sites[s];
      return (layer < 0 || at === layer) && (kind < 0 || of === kind);
    });
    this.siteCount = sites.length;
    this.weights = this.sums(sites);
    const size = this.experts.length;
    this.tops = this.spans.map((_, t) => {
      let best = -1;
      let most = 0;
      for (let z = 0; z < size; z++) {
        const weight = this.weights[t * size + z];
        if (weight > most) [best, most] = [z, weight];
      }
      return best;
    });
    this.paint();
    this.showLegend();
    this.activate(this.active);
  }

  paint() {
    this.spans.forEach((span, t) => {
      const expert = this.tops[t];
      const dim = this.only !== null && expert !== this.only ? " tx-dim" : "";
      const look = `tx-token ${this.look(expert)}${dim}`;
      if (span.className !== look) span.className = look;
    });
  }

  showLegend() {
    const counts = new Map();
    this.tops.forEach((z) => counts.set(z, (counts.get(z) ?? 0) + 1));
    const ranked = [...counts].filter(([z]) => z >= 0).sort((a, b) => b[1] - a[1]);
    const buttons = ranked.slice(0, TokenExplorer.LEGEND).map(([z, count]) =>
      TokenExplorer.element(
        "button",
        {type: "button", "data-expert": z, "aria-pressed": String(z === this.only)},
        TokenExplorer.element("span", {class: `tx-swatch ${this.look(z)}`, "aria-hidden": "true"}),
        ` ${this.experts[z]} `,
        TokenExplorer.element("span", {class: "tx-count"}, `${count} ${count === 1 ? "token" : "tokens"}`),
      ),
    );
    const left = ranked.length - buttons.length;
    const more = left > 0 ? [TokenExplorer.element("span", {class: "tx-count"}, `and ${left} more`)] : [];
    this.legend.replaceChildren(...buttons, ...more);
  }

  pick(event) {
    const button = event.target.closest("button");
    if (!button) return;
    const expert = Number(button.dataset.expert);
    this.only = this.only === expert ? null : expert;
    for (const each of this.legend.querySelectorAll("button")) {
      each.setAttribute("aria-pressed", String(Number(each.dataset.expert) === this.only));
    }
    this.paint();
  }

  // [name, weight in thousandths, expert] of a token: the greatest, then the rest; 1000 in all.
  shares(t) {
    const size = this.experts.length;
    const row = this.weights.subarray(t * size, (t + 1) * size);
    const whole = 255 * this.siteCount;
    const present = [...row.keys()].filter((z) => row[z] > 0).sort((a, b) => row[b] - row[a]);
    const listed = present.slice(0, TokenExplorer.LISTED);
    const rows = listed.map((z) => [this.experts[z], row[z], z]);
    const rest = present.slice(TokenExplorer.LISTED).reduce((sum, z) => sum + row[z], 0);
    const unknown = whole - listed.reduce((sum, z) => sum + row[z], 0) - rest;
    const missing = this.stream.is_cut ? rest + unknown : rest;
    if (missing > 0) rows.push(["others", missing, -1]);
    if (!this.stream.is_cut && unknown > 0) rows.push(["no expert", unknown, -1]);
    let before = 0;
    return rows.map(([name, weight, z]) => {
      const from = Math.round((1000 * before) / whole);
      before += weight;
      return [name, Math.round((1000 * before) / whole) - from, z];
    });
  }

  activate(t) {
    const span = this.spans[t];
    if (!span) return;
    this.spans[this.active]?.setAttribute("aria-selected", "false");
    this.active = t;
    span.setAttribute("aria-selected", "true");
    this.text.setAttribute("aria-activedescendant", span.id);
    const shares = this.shares(t);
    const said = shares.map(([name, weight]) => `${name} ${(weight / 1000).toFixed(2)}`).join(", ");
    const part = this.partNames[this.stream.parts[t]];
    const token = this.stream.tokens[t];
    span.setAttribute("aria-label", `${token.trim() || "space"}: ${said}`);
    const make = TokenExplorer.element;
    const rows = shares.map(([name, weight, z]) => {
      const bar = make("span", {class: `tx-bar ${this.look(z)}`, "aria-hidden": "true"});
      bar.style.inlineSize = `${weight / 10}%`;
      return make(
        "li",
        {"data-weight": weight / 1000},
        make("span", {class: "tx-name"}, name),
        make("span", {class: "tx-weight"}, (weight / 1000).toFixed(3)),
        make("span", {class: "tx-track"}, bar),
      );
    });
    this.details.replaceChildren(
      make("p", {}, make("code", {}, JSON.stringify(token)), ` token ${t + 1} of ${this.spans.length}, ${part}`),
      make("ol", {}, ...rows),
      make("p", {class: "tx-count"}, `mean over ${this.siteCount} ${this.siteCount === 1 ? "site" : "sites"}`),
    );
  }

  point(event) {
    const span = event.target.closest(".tx-token");
    if (span) this.activate(this.spans.indexOf(span));
  }

  press(event) {
    const last = this.spans.length - 1;
    const moves = {
      ArrowRight: () => this.active + 1,
      ArrowLeft: () => this.active - 1,
      ArrowDown: () => this.line(1),
      ArrowUp: () => this.line(-1),
      Home: () => 0,
      End: () => last,
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    this.activate(Math.min(last, Math.max(0, move())));
    this.spans[this.active].scrollIntoView({block: "nearest"});
  }

  // The token below or above the active one, as the lines are broken now.
  line(step) {
    const here = this.spans[this.active].getClientRects()[0];
    let best = this.active;
    let least = Infinity;
    for (let t = this.active + step; t >= 0 && t < this.spans.length; t += step) {
      const there = this.spans[t].getClientRects()[0];
      const lines = Math.round(((there.top - here.top) * step) / here.height);
      if (lines < 1) continue;
      if (lines > 1 && best !== this.active) break;
      const away = Math.abs(there.left - here.left);
      if (away < least) [best, least] = [t, away];
    }
    return best;
  }
}
