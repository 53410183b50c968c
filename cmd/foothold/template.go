package main

import (
	"fmt"

	"foothold/client/term"
	"foothold/protocol/api"

	"github.com/spf13/cobra"
)

func templateCommand() *cobra.Command {
	return contextFlag(group("template", "Build, audit and register operating system templates",
		`A template is a read-only image of an operating system, verified block by block and
encrypted. It is built and audited on your side; the provider stores ciphertext alone.`,
		templateBuild(), templateRotate(), templateList(), templateAudit(), templateDelete()))
}

func templateList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the registered templates",
		Example: "  foothold template list",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			list, err := s.Templates(cmd.Context())
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				for i := range list {
					list[i].Boot, list[i].Hosts = orEmpty(list[i].Boot), orEmpty(list[i].Hosts)
				}
				return printJSON(cmd.OutOrStdout(), orEmpty(list))
			}
			if len(list) == 0 {
				s.log.Line("no templates; make one: foothold template build debian")
				return nil
			}
			var rows [][]string
			for _, t := range list {
				rows = append(rows, []string{t.Name, itoa(t.Version), t.State, t.SHA256.Short(), bytesText(t.Size), term.Clean(t.Release), volumeKind(t), when(t.Created), itoa(len(t.Hosts)), itoa(t.VMs)})
			}
			for _, t := range list {
				if t.Problem != "" && t.State == api.TemplateCurrent {
					s.log.Line("template %s cannot be used, build it again: %s", t.Name, term.Clean(t.Problem))
				}
			}
			s.out.Table([]string{"name", "version", "state", "sha256", "size", "release", "volumes", "created", "hosts", "vms"}, rows)
			return nil
		}),
	})
}

func templateDelete() *cobra.Command {
	yes := false
	c := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Remove a template that no VM uses",
		Long: `Remove a template: its ciphertext leaves the hosts, and its key the vault. A template
that a VM uses is refused.`,
		Example: "  foothold template delete debian --yes",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			if !yes {
				if err := confirm(cmd, fmt.Sprintf("Delete template %s? Its key is destroyed.", args[0])); err != nil {
					return err
				}
			}
			if err := s.DeleteTemplate(cmd.Context(), args[0]); err != nil {
				return err
			}
			s.log.Line("template %s is gone", args[0])
			return nil
		}),
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}
