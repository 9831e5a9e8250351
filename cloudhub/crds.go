package main

import (
	"github.com/spf13/cobra"

	"github.com/longshore-edge/longshore/deploy"
)

func crdsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "crds",
		Short: "Print the CustomResourceDefinitions of Edge and Model",
		Long: `Print the CustomResourceDefinitions of Edge and Model as YAML:

  cloudhub crds | kubectl apply -f -`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(deploy.CRDs())
			return err
		},
	}
}
