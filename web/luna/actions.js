// What the buttons do: one call to the daemon each, and a message about the outcome.

/**
 * Make the function that runs a button's call and reports the outcome.
 * @param {(body: object) => Promise<object|null>} call answers `{result, notes}` or `{error, message, hint}`
 * @param {(severity: string, text: string) => void} say
 * @returns {(button: HTMLButtonElement, body: object, done: string) => Promise<boolean>} runs an op with the button
 *   disabled meanwhile; `done` is the message of a success
 */
export function createActions(call, say) {
  return async (button, body, done) => {
    if (button.getAttribute("aria-busy") === "true") return false;
    button.setAttribute("aria-busy", "true");
    try {
      const answer = await call(body);
      if (answer === null) return false;
      if (answer.error) {
        say("error", [answer.message ?? answer.error, answer.hint].filter(Boolean).join(". "));
        return false;
      }
      say("success", [done, ...(answer.notes ?? [])].join(". "));
      return true;
    } catch (error) {
      say("error", `The daemon was not reached: ${error.message}`);
      return false;
    } finally {
      button.removeAttribute("aria-busy");
    }
  };
}

/**
 * Make a button ask for confirmation before the button acts, where an action cannot be undone.
 * @param {HTMLButtonElement} button @param {string} question @param {() => void} action
 */
export function confirmFirst(button, question, action) {
  const label = button.textContent;
  let timer = 0;
  const calm = () => {
    clearTimeout(timer);
    button.textContent = label;
    delete button.dataset.asking;
  };
  button.addEventListener("blur", calm);
  button.addEventListener("click", () => {
    if (button.dataset.asking) {
      calm();
      action();
      return;
    }
    button.dataset.asking = "yes";
    button.textContent = question;
    timer = setTimeout(calm, 5000);
  });
}
