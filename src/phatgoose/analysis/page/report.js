// The page's own script: a text is unpacked and shown when it is chosen.
"use strict";

const choice = document.getElementById("trace");
if (choice) {
  const show = () => {
    const trace = document.querySelectorAll("script.trace")[choice.value];
    window.explorer = new TokenExplorer(document.getElementById("explorer"), JSON.parse(trace.textContent));
  };
  choice.addEventListener("change", show);
  show();
}
