// Converts the LaTeX that pymdownx.arithmatex marks, \(...\) in a span and \[...\] in a div, to MathML, which browsers draw themselves.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const latex = element.textContent.trim().slice(2, -2)
    katex.render(latex, element, { displayMode: element.tagName === "DIV", output: "mathml", throwOnError: false })
  }
})
